"""The one held-out loss, held to a computation by hand: padding wherever it stands, labels, ranks."""

import contextlib
import math

import pytest
import torch

import modlab
from modlab import measure
from modlab.errors import ModlabError
from modlab.hf.logits import LOSS_CHUNK
from tests.helpers.models import alternate_layers
from tests.measure.models import VOCAB, dense_model, spread_gates

T = 24


def loss_by_hand(model, batch):
    """Sum of -log p and how many: target t counts if t and t - 1 are real and the label of t is not -100."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    labels = batch.get("labels", ids)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        log_p = model(**inputs, use_cache=False).logits.double().log_softmax(-1)
    total, count = 0.0, 0
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if mask[row, t] and mask[row, t - 1] and labels[row, t] != -100:
                total -= float(log_p[row, t - 1, labels[row, t]])
                count += 1
    return total, count


def padded(where, labels=False):
    """Two rows, the second with padding: at its start, its end, or in two places inside."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCAB, (2, T), generator=generator)
    mask = torch.ones_like(ids)
    holes = {"left": [slice(0, 7)], "right": [slice(17, T)], "inside": [slice(5, 8), slice(15, 16)]}
    for hole in holes.get(where, []):
        mask[1, hole] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if labels:
        batch["labels"] = torch.randint(1, VOCAB, (2, T), generator=generator)
        batch["labels"][:, :10] = -100
        batch["labels"][0, 12] = -100
    return batch


def models():
    yield dense_model()
    yield spread_gates(modlab.convert(dense_model(), alternate_layers()))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("where", "predicted"), [("none", 46), ("left", 39), ("right", 39), ("inside", 40)])
def test_loss_is_the_sum_by_hand(where, predicted, labels):
    batch = padded(where, labels)
    for model in models():
        total, count = loss_by_hand(model, batch)
        assert count == predicted or labels
        found = measure.evaluate(model, [batch])
        assert found.predicted_tokens == count
        assert found.loss == pytest.approx(total / count, rel=1e-5)
        assert measure.evaluate(model, [batch], cache=False).loss == pytest.approx(found.loss, rel=1e-6)


def test_batches_of_uneven_labels_count_by_their_tokens():
    model, batches = dense_model(), [padded("left", labels=True), padded("right")]
    sums = [loss_by_hand(model, batch) for batch in batches]
    found = measure.evaluate(model, batches)
    assert found.predicted_tokens == sum(count for _, count in sums)
    assert found.loss == pytest.approx(sum(total for total, _ in sums) / found.predicted_tokens, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_changes_nothing_but_the_forwards(batch_size):
    """Rows of a data set are joined, large batches split; the figures stay."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randint(0, VOCAB, (11, T), generator=generator)
    sizes = []
    for model in models():
        model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        whole = measure.evaluate(model, rows)
        for data in (rows, [{"input_ids": row} for row in rows]):
            sizes.clear()
            found = measure.evaluate(model, data, batch_size=batch_size)
            assert max(sizes) == min(batch_size, 11) and len(sizes) == -(-11 // batch_size)
            assert found.loss == pytest.approx(whole.loss, rel=1e-5)
            assert found.predicted_tokens == 11 * (T - 1)
            assert found.keep_ratio_by_layer == pytest.approx(whole.keep_ratio_by_layer)
            assert (found.kv_bytes, found.dense_kv_bytes) == (whole.kv_bytes, whole.dense_kv_bytes)


def test_many_rows_are_widened_a_few_positions_at_a_time():
    rows = torch.randint(0, VOCAB, (LOSS_CHUNK + 1, 4), generator=torch.Generator().manual_seed(7))
    total, count = loss_by_hand(dense_model(), {"input_ids": rows})
    assert measure.evaluate(dense_model(), rows, cache=False).loss == pytest.approx(total / count, rel=1e-5)


def test_max_batches_stops_early():
    batches = [padded("none"), padded("left"), padded("right")]
    assert measure.evaluate(dense_model(), iter(batches), max_batches=2).predicted_tokens == 46 + 39


def test_a_given_forward_and_autocast_are_used():
    model, seen = dense_model(), []

    def forward(**inputs):
        seen.append(inputs)
        assert torch.is_autocast_enabled("cpu")
        return model(**inputs)

    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    found = measure.evaluate(model, [padded("left", labels=True)], autocast=autocast, forward=forward)
    assert sorted(seen[0]) == ["attention_mask", "input_ids", "use_cache"]
    assert found.loss == pytest.approx(measure.evaluate(model, [padded("left", True)]).loss, rel=0.02)


def test_no_cache_is_filled_where_none_is_measured():
    found = measure.evaluate(dense_model(), [padded("none")], cache=False)
    assert (found.kv_bytes, found.dense_kv_bytes) == (0, 0)


class Ranks:
    """Stands for one process of several: runs its share and leaves its sums to be added up."""

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world
        self.given = None

    def reduce(self, sums, how):
        assert how == "sum"
        self.given = sums
        return sums


class Merged(Ranks):
    """The first of several processes, once the sums of all have been added."""

    def __init__(self, sums, world):
        super().__init__(0, world)
        self.sums = sums

    def reduce(self, sums, how):
        return self.sums


def of_one_rank(model, batches, rank, world):
    """(forwards, the sums that this rank hands over to be added)."""
    forwards, accelerator = [], Ranks(rank, world)

    def forward(**inputs):
        forwards.append(inputs)
        return model(**inputs)

    with contextlib.suppress(ModlabError):  # these sums are one rank's: it may have nothing to predict
        measure.evaluate(model, batches, accelerator=accelerator, forward=forward)
    return len(forwards), accelerator.given


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_batches_and_forward_equally_often(world):
    batches = [padded("none"), padded("left"), padded("inside", True), padded("right"), padded("none", True)]
    for model in models():
        ranks = [of_one_rank(model, batches, rank, world) for rank in range(world)]
        assert {forwards for forwards, _ in ranks} == {-(-len(batches) // world)}
        merged = measure.evaluate(model, batches, accelerator=Merged(sum(sums for _, sums in ranks), world))
        alone = measure.evaluate(model, batches)
        assert merged.loss == pytest.approx(alone.loss, rel=1e-12)
        assert merged.keep_ratio_by_layer == pytest.approx(alone.keep_ratio_by_layer)
        for name in ("predicted_tokens", "kv_bytes", "dense_kv_bytes"):
            assert getattr(merged, name) == getattr(alone, name)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "every label is -100"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "two real tokens in a row"),
        ({"input_ids": [[1, 2]], "pixel_values": [[0, 0]]}, "pixel_values"),
    ],
)
def test_what_teaches_nothing_is_refused(batch, message):
    with pytest.raises(ModlabError, match=message):
        measure.evaluate(dense_model(), [batch])


def test_loss_is_the_models_own(batches):
    model = dense_model()
    with torch.no_grad():
        expected = torch.stack([model(b, labels=b).loss for b in batches]).mean()
    assert measure.loss(model, None, batches) == pytest.approx(float(expected), rel=1e-6)
    result = measure.evaluate(model, batches)
    assert result.keep_ratio == 1.0
    assert result.predicted_tokens == 3 * 2 * 99
    assert result.kv_saving == 1.0
    assert result.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)


def test_loss_ignores_padding(batches):
    model = dense_model()
    ids = batches[0][:1, :20]
    alone = measure.loss(model, None, ids)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones_like(ids)], 1)
    got = measure.evaluate(model, {"input_ids": padded, "attention_mask": mask})
    assert got.loss == pytest.approx(alone, rel=1e-5)
    assert got.predicted_tokens == 19
    after = {name: value.flip(1) for name, value in {"input_ids": padded, "attention_mask": mask}.items()}
    assert measure.evaluate(model, after).predicted_tokens == 19


def test_modes_are_restored(batches):
    model = dense_model().train()
    measure.loss(model, None, batches)
    assert model.training
