"""Recall against rules whose losses are known, down to the token that is scored first and last."""

import math
import warnings

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from tests.helpers.handmade import HandMade, bigram, copier
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.tokenizers import make_tokenizer

UNIFORM = math.log(128)
SMALL = {"passage": 16, "prefix": 8, "rows": 5, "progress": False}


@pytest.fixture(scope="module")
def stream():
    return torch.randint(0, 128, (1, 3000), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def routed(make_llama):
    """A tiny converted Llama whose gates differ from token to token."""
    model = modlab.convert(make_llama(vocab_size=128, max_position_embeddings=256), alternate_layers())
    scatter_gates(model)
    return model


@pytest.mark.parametrize("distance", [40, 41, 100])
def test_a_model_that_copies_over_this_distance_has_no_loss_on_the_second_copy(stream, distance):
    table = modlab.recall(HandMade(copier(distance)), stream, distances=(40, 41, 100), **SMALL)
    assert table.distance.to_list() == [40, 41, 100]
    at = table.set_index("distance")
    assert at.second_loss[distance] == pytest.approx(0, abs=1e-6)
    assert (at.second_loss.drop(distance) >= UNIFORM - 1e-6).all(), "one token off is as bad as far off"
    assert at.first_loss[distance] == pytest.approx(UNIFORM)  # nothing to copy from so early in a row
    assert at.tokens[distance] == 5 * 15


@pytest.mark.parametrize("token", [0, 1, 7, 15])
def test_every_token_of_the_second_copy_counts_once_but_its_first(stream, token):
    model = HandMade(copier(40, wrong_at=8 + 40 + token))
    table = modlab.recall(model, stream, distances=(40,), **SMALL)
    expected = UNIFORM / 15 if token else 0
    assert table.second_loss[0] == pytest.approx(expected, abs=1e-6)


def test_a_model_without_induction_finds_both_copies_alike(stream):
    table = modlab.recall(HandMade(bigram()), stream, distances=(40, 100), **SMALL)
    assert (table.first_loss > 1).all()
    assert table.second_loss.to_list() == pytest.approx(table.first_loss.to_list(), rel=1e-6)


def test_rows_are_running_text_and_then_the_passage_again(stream):
    model = HandMade(bigram())
    modlab.recall(model, stream, distances=(40, 100), **SMALL)
    short, long = model.seen[:5], model.seen[5:]
    assert {len(row) for row in short} == {8 + 40 + 16} and {len(row) for row in long} == {8 + 100 + 16}
    starts = []
    for near, far in zip(short, long, strict=True):
        (found,) = (stream[0].unfold(0, 108, 1) == far[:108]).all(1).nonzero()
        starts.append(int(found))
        assert far[108:].tolist() == far[8:24].tolist()
        assert near.tolist() == [*far[:48].tolist(), *far[8:24].tolist()]
    starts.sort()
    assert all(b - a >= 16 for a, b in zip(starts, starts[1:], strict=False)), "passages do not overlap"


def test_losses_are_the_models_own(routed, stream):
    """One row worked out by hand from the model's logits."""
    table = modlab.recall(routed, stream, distances=(50,), **SMALL | {"rows": 1}, by_row=True)
    fake = HandMade(bigram())
    modlab.recall(fake, stream, distances=(50,), **SMALL | {"rows": 1})
    (row,) = fake.seen
    with torch.no_grad(), modlab.record_routing(routed) as recording:
        logits = routed(row[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")  # of tokens 1, 2, ...
    assert table.first_loss[0] == pytest.approx(float(loss[8:23].mean()), rel=1e-5)
    assert table.second_loss[0] == pytest.approx(float(loss[58:73].mean()), rel=1e-5)
    keep = torch.stack(list(recording.steps[0].keep.values()))[:, 0].float()
    assert 0 < keep.mean() < 1
    assert table.first_keep_ratio[0] == pytest.approx(float(keep[:, 8:24].mean()))
    assert table.second_keep_ratio[0] == pytest.approx(float(keep[:, 58:74].mean()))


@pytest.mark.parametrize(("since", "share"), [(58, 1.0), (59, 15 / 16), (73, 1 / 16), (74, 0.0), (57, 1.0)])
def test_keep_ratios_are_of_the_copies_tokens(routed, stream, since, share):
    def from_here_on(layer, gate, positions):
        return positions >= since

    with modlab.routing_override(routed, from_here_on):
        table = modlab.recall(routed, stream, distances=(50,), **SMALL)
    assert table.second_keep_ratio[0] == pytest.approx(share)
    assert table.first_keep_ratio[0] == 0


def test_a_dense_model_keeps_everything(make_llama, stream):
    table = modlab.recall(make_llama(vocab_size=128), stream, distances=(50,), **SMALL)
    assert table.first_keep_ratio[0] == table.second_keep_ratio[0] == 1
    assert table.second_loss[0] == pytest.approx(UNIFORM, abs=0.5)


def test_batches_change_nothing(routed, stream):
    one, three = (
        modlab.recall(routed, stream, distances=(30, 50), batch_size=size, by_row=True, **SMALL)
        for size in (1, 3)
    )
    assert one.row.to_list() == [0, 1, 2, 3, 4] * 2
    for name in ("first_loss", "second_loss"):
        assert three[name].to_list() == pytest.approx(one[name].to_list(), rel=1e-5)
    for name in ("first_keep_ratio", "second_keep_ratio"):
        assert three[name].to_list() == one[name].to_list()


def test_means_are_those_of_the_rows(routed, stream):
    by_row = modlab.recall(routed, stream, distances=(30, 50), by_row=True, **SMALL)
    table = modlab.recall(routed, stream, distances=(30, 50), **SMALL)
    rows = by_row[by_row.distance == 50]
    last = table.iloc[-1]
    assert last.second_loss == pytest.approx(rows.second_loss.mean())
    assert last.second_stderr == pytest.approx(rows.second_loss.sem())
    assert last.second_keep_ratio == pytest.approx(rows.second_keep_ratio.mean())
    # what comes before the second copy is the same at every distance, and models are causal
    assert table.first_loss[0] == pytest.approx(table.first_loss[1], rel=1e-5)


def test_a_seed_gives_the_same_rows_again_and_another_one_others(stream):
    def rows(seed):
        model = HandMade(bigram())
        modlab.recall(model, stream, distances=(40,), seed=seed, **SMALL)
        return [row.tolist() for row in model.seen]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_texts_and_padded_batches_are_one_stream(stream):
    tokenizer = make_tokenizer()
    text = "the router decides which token runs and which token skips, " * 60
    ids = torch.tensor(tokenizer(text)["input_ids"])
    half = len(ids) // 2
    padded = torch.stack([torch.cat([torch.zeros(9, dtype=torch.long), ids[:half]])] * 2)
    padded[1] = torch.cat([ids[half : 2 * half], torch.zeros(9, dtype=torch.long)])
    mask = torch.ones_like(padded)
    mask[0, :9], mask[1, -9:] = 0, 0
    settings = SMALL | {"distances": (40,)}
    model = HandMade(bigram(vocab_size=500), vocab_size=500)
    from_text = modlab.recall(model, text, tokenizer, **settings)
    from_ids = modlab.recall(model, {"input_ids": padded, "attention_mask": mask}, **settings)
    assert from_ids.second_loss[0] == pytest.approx(from_text.second_loss[0], abs=1e-6)


def test_the_model_runs_in_eval_mode_and_gets_its_mode_back(make_llama, stream):
    model = make_llama(vocab_size=128, attention_dropout=0.5)
    quiet = modlab.recall(model, stream, distances=(40,), **SMALL)
    model.train()
    assert modlab.recall(model, stream, distances=(40,), **SMALL).equals(quiet)
    assert all(module.training for module in model.modules())


def test_distances_beyond_the_context_are_left_out_and_told(stream):
    model = HandMade(bigram(), context=120)
    with pytest.warns(UserWarning, match=r"97 tokens: a row of 121 tokens \(prefix 8 \+ distance \+ pas"):
        table = modlab.recall(model, stream, distances=(97, 40, 96, 40), **SMALL)
    assert table.distance.to_list() == [40, 96]
    assert list(table.attrs["left_out"]) == [97]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert modlab.recall(model, stream, distances=(96,), **SMALL).attrs["left_out"] == {}


def test_what_cannot_be_measured_is_refused(stream):
    model = HandMade(bigram(), context=120)
    with pytest.raises(ModlabError, match="context of 120; distances up to 96 fit"):
        modlab.recall(model, stream, distances=(200,), **SMALL)
    with pytest.raises(ModlabError, match="context of 20; no distance fits it"):
        modlab.recall(HandMade(bigram(), context=20), stream, distances=(40,), **SMALL)
    with pytest.raises(ModlabError, match="distance of 15 tokens is too short: at least 16"):
        modlab.recall(model, stream, distances=(15,), **SMALL)
    with pytest.raises(ModlabError, match="passage=1"):
        modlab.recall(model, stream, passage=1)
    with pytest.raises(ModlabError, match="prefix=-1"):
        modlab.recall(model, stream, prefix=-1)
    with pytest.raises(ModlabError, match="batch_size=0"):
        modlab.recall(model, stream, distances=(40,), batch_size=0, **SMALL)
    with pytest.raises(ModlabError, match="no distances given"):
        modlab.recall(model, stream, distances=(), **SMALL)
    with pytest.raises(ModlabError, match="rows=0"):
        modlab.recall(model, stream, distances=(40,), **SMALL | {"rows": 0})


def test_too_little_text_says_how_much_is_needed():
    model = HandMade(bigram())
    ids = torch.arange(111)[None] % 128
    with pytest.raises(ModlabError, match="hold 111 tokens, which gives 4 rows of 48") as told:
        modlab.recall(model, ids, distances=(40,), **SMALL)
    assert "5 are asked for.\nGive 112 tokens" in str(told.value)
    modlab.recall(model, torch.arange(112)[None] % 128, distances=(40,), **SMALL)
