"""Properties of every routing, batch, padding and chunking; hypothesis looks for one where they do not hold.

The yardstick is the masked reference (`execution/reference.py`); for cache operations, a run without a cache.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import modlab
from modlab.cache.bytes import snapshot
from modlab.cache.layer import RaggedLayer
from modlab.routing.state import masked_execution

VOCAB, LAYERS, HEADS_KV, HEAD_DIM, LONGEST = 64, 4, 2, 8, 24
TOKEN_BYTES = 2 * HEADS_KV * HEAD_DIM * 4  # K and V, fp32
INDEX_BYTES = 4  # a ragged layer notes the column of each stored token

few = settings(
    max_examples=30,
    derandomize=True,  # the same examples everywhere: a failure in CI is a failure here
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# (architecture, routed layers): layer 0 routed or not, all of them, and a sliding window shorter than the
# inputs
MODELS = [("llama", (1, 3)), ("llama", (0, 1, 2, 3)), ("mistral", (0, 2))]
WINDOW = 6


@functools.cache
def build(which: int):
    """A converted model with spread-out gates, and its decision threshold at the middle of them."""
    name, layers = MODELS[which]
    torch.manual_seed(which)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS_KV,
        "max_position_embeddings": 4 * LONGEST,
    }
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=WINDOW))
    model = modlab.convert(model.eval(), modlab.MoDConfig(skip="layer", layers=list(layers), keep_first=1))
    with torch.no_grad():
        for layer in layers:
            router = model.model.layers[layer].mod_router
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    return model


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [B, T], and the masks that force the routing."""

    which: int
    rows: int
    length: int
    side: str
    pads: tuple[int, ...]
    share: float
    seed: int

    @property
    def model(self):
        return build(self.which)

    @property
    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, VOCAB, (self.rows, self.length), generator=generator)

    @property
    def mask(self) -> torch.Tensor:
        mask = torch.ones(self.rows, self.length, dtype=torch.long)
        for row, pad in enumerate(self.pads):
            if pad and self.side == "left":
                mask[row, :pad] = 0
            elif pad:
                mask[row, -pad:] = 0
        return mask

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
        """Keyword arguments of a forward over columns start..stop, positions as `generate` passes them."""
        stop = self.length if stop is None else stop
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        return {
            "input_ids": self.ids[:, start:stop],
            "attention_mask": self.mask[:, :stop],
            "position_ids": positions[:, start:stop],
        }

    def keep(self, layer: int) -> torch.Tensor:
        """Which positions of each row this layer is told to keep, bool [B, more than T]."""
        generator = torch.Generator().manual_seed(1000 * self.seed + layer)
        return torch.rand(self.rows, 4 * LONGEST, generator=generator) < self.share

    def forced(self):
        """The override: masks by layer, row and position among the row's real tokens."""
        masks = {layer: self.keep(layer) for layer in range(LAYERS)}
        return modlab.routing_override(
            self.model, lambda layer, gate, positions: masks[layer].gather(1, positions.clamp_min(0))
        )

    def expected_kept(self) -> torch.Tensor:
        """Real tokens that each routed layer keeps, long [routed layers, B]."""
        real = self.mask.bool()
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        layers = self.model.mod.layers
        return torch.stack([(self.keep(layer).gather(1, positions) & real).sum(1) for layer in layers])


@st.composite
def batches(draw, sides=("none", "left", "right"), min_rows=1) -> Batch:
    rows = draw(st.integers(min_rows, 3))
    length = draw(st.integers(2, LONGEST))
    side = draw(st.sampled_from(sides))
    pads = tuple(draw(st.integers(0, length - 1)) if side != "none" else 0 for _ in range(rows))
    return Batch(
        which=draw(st.integers(0, len(MODELS) - 1)),
        rows=rows,
        length=length,
        side=side,
        pads=pads,
        share=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        seed=draw(st.integers(0, 999)),
    )


def assert_real_equal(got: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=2e-5)


def reference(batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of the masked reference under the batch's forced routing."""
    with torch.no_grad(), batch.forced(), masked_execution(batch.model):
        return batch.model(**batch.inputs(), use_cache=False).logits


def windowed(model, layer: int) -> bool:
    return model.mod.windows.get(layer) is not None


def check_bytes(cache, batch: Batch, fresh: bool) -> None:
    """Allocated bytes follow kept tokens: exactly after one forward, within the slack after more."""
    rows = snapshot(cache)
    assert sum(row["kv_bytes"] for row in rows) == cache.nbytes
    assert sum(row["kept_tokens"] for row in rows) == int(cache.kept_tokens.sum())
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, RaggedLayer):
            continue
        kept = rows[index]["kept_tokens"]
        slack = (
            0 if fresh and not windowed(batch.model, index) else sum(max(16, n // 32) for n in layer.lengths)
        )
        # a sliding layer is trimmed once it holds a slack more than its window, so it may hold that much more
        assert kept * TOKEN_BYTES <= rows[index]["kv_bytes"]
        assert rows[index]["kv_bytes"] <= (kept + 2 * slack) * (TOKEN_BYTES + INDEX_BYTES)
        if fresh and not windowed(batch.model, index):
            assert rows[index]["kv_bytes"] == kept * (TOKEN_BYTES + INDEX_BYTES)


@few
@given(batches())
def test_packed_execution_equals_the_masked_reference(batch) -> None:
    expected = reference(batch)
    with torch.no_grad(), batch.forced():
        assert_real_equal(batch.model(**batch.inputs(), use_cache=False).logits, expected, batch.mask)
        cached = batch.model(**batch.inputs(), use_cache=True)
    assert_real_equal(cached.logits, expected, batch.mask)


@few
@given(batches())
def test_stored_bytes_are_the_kept_tokens_and_nothing_else(batch) -> None:
    with torch.no_grad(), batch.forced():
        cache = batch.model(**batch.inputs(), use_cache=True).past_key_values
    expected = batch.expected_kept()
    for number, layer in enumerate(batch.model.mod.layers):
        if not windowed(batch.model, layer):
            assert cache.kept_tokens[layer].tolist() == expected[number].tolist()
    assert cache.get_seq_length() == batch.length
    check_bytes(cache, batch, fresh=True)


@few
@given(batches(), st.lists(st.integers(1, LONGEST - 1), max_size=4), st.booleans())
@example(
    Batch(0, 2, 6, "left", (5, 0), 0.5, 1), [1, 2, 3, 4, 5], False
)  # one column at a time, padding first
def test_chunks_do_not_change_the_result(batch, cuts, own_cache) -> None:
    expected = reference(batch)
    edges = [0, *sorted({cut for cut in cuts if cut < batch.length}), batch.length]
    cache = modlab.RaggedCache(batch.model) if own_cache else None
    logits = []
    with torch.no_grad(), batch.forced():
        for start, stop in zip(edges, edges[1:], strict=False):
            out = batch.model(**batch.inputs(start, stop), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert_real_equal(torch.cat(logits, 1), expected, batch.mask)
    kept = batch.expected_kept()
    for number, layer in enumerate(batch.model.mod.layers):
        if not windowed(batch.model, layer):
            assert cache.kept_tokens[layer].tolist() == kept[number].tolist()
    check_bytes(cache, batch, fresh=len(edges) == 2)


@contextlib.contextmanager
def threshold_at_a_gap(model, **inputs):
    """Thresholds in the widest gap of each layer's gates, so that rounding cannot move a token over it.

    Set from the first routed layer to the last, since what one layer skips changes the gates after it.
    """
    before = dict(model.mod.thresholds)
    try:
        for layer in model.mod.layers:
            with modlab.record_routing(model) as recording, torch.no_grad():
                model(**inputs, use_cache=False)
            step = recording.steps[0]
            gates = step.gate[layer][step.real].sort().values.clamp(1e-4, 1 - 1e-4)
            if len(gates) > 1:
                widest = int(gates.diff().argmax())
                modlab.set_threshold(model, float(gates[widest : widest + 2].mean()), layers=[layer])
        yield
    finally:
        modlab.set_threshold(model, before)


@few
@given(batches(min_rows=2), st.integers(0, 999))
def test_changing_row_0_never_changes_another_row(batch, seed) -> None:
    """Routing by the routers themselves: logits and decisions of the other rows stay what they were."""
    model, inputs = batch.model, batch.inputs()
    other = inputs["input_ids"].clone()
    other[0] = torch.randint(0, VOCAB, (batch.length,), generator=torch.Generator().manual_seed(seed))
    with threshold_at_a_gap(model, **inputs), torch.no_grad(), modlab.record_routing(model) as recording:
        before = model(**inputs, use_cache=True)
        after = model(**inputs | {"input_ids": other}, use_cache=True)
    first, second = recording.steps
    for layer in model.mod.layers:
        assert torch.equal(first.keep[layer][1:], second.keep[layer][1:])
    assert_real_equal(after.logits[1:], before.logits[1:], batch.mask[1:])
    assert (
        before.past_key_values.kept_tokens[:, 1:].tolist()
        == after.past_key_values.kept_tokens[:, 1:].tolist()
    )


@few
@given(batches(sides=("left", "right"), min_rows=2))
def test_a_padded_row_is_routed_as_it_would_be_alone(batch) -> None:
    model = batch.model
    with (
        threshold_at_a_gap(model, **batch.inputs()),
        torch.no_grad(),
        modlab.record_routing(model) as recording,
    ):
        together = model(**batch.inputs(), use_cache=True)
        real = batch.mask.bool()
        for row in range(batch.rows):
            alone = model(batch.ids[row][real[row]][None], use_cache=True)
            torch.testing.assert_close(alone.logits[0], together.logits[row][real[row]], rtol=1e-4, atol=2e-5)
    batched, *singles = recording.steps
    for row, single in enumerate(singles):
        for layer in model.mod.layers:
            assert torch.equal(batched.keep[layer][row][real[row]], single.keep[layer][0])
            assert not batched.keep[layer][row][~real[row]].any()


OPERATIONS = {
    "reorder": lambda cache, index: cache.reorder_cache(index),
    "select": lambda cache, index: cache.batch_select_indices(index),
    "repeat": lambda cache, index: cache.batch_repeat_interleave(2),
}


@few
@given(batches(sides=("none", "left")), st.sampled_from(sorted(OPERATIONS)), st.data())
def test_row_operations_equal_recomputing(batch, operation, data) -> None:
    """Beams reorder, repeat and drop rows of the cache; two more tokens then come out as without any
    cache."""
    model, extra = batch.model, 2
    index = torch.tensor(data.draw(st.lists(st.integers(0, batch.rows - 1), min_size=1, max_size=4)))
    if operation == "reorder":
        index = index.repeat(batch.rows)[: batch.rows]
    rows = torch.arange(batch.rows).repeat_interleave(2) if operation == "repeat" else index
    new = torch.randint(0, VOCAB, (len(rows), extra), generator=torch.Generator().manual_seed(batch.seed + 1))
    ids = torch.cat([batch.ids[rows], new], 1)
    mask = torch.cat([batch.mask[rows], torch.ones(len(rows), extra, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with threshold_at_a_gap(model, **whole), torch.no_grad():
        expected = model(**whole, use_cache=False).logits
        cache = model(**batch.inputs(), use_cache=True).past_key_values
        OPERATIONS[operation](cache, index)
        for t in range(batch.length, batch.length + extra):
            out = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            torch.testing.assert_close(out.logits[:, 0], expected[:, t], rtol=1e-4, atol=2e-5)
    check_bytes(cache, batch, fresh=False)


@few
@given(batches(sides=("none", "left")), st.integers(1, LONGEST - 1))
def test_cropping_and_going_on_equals_never_having_seen_it(batch, back) -> None:
    """What assisted decoding does with rejected tokens."""
    model = batch.model
    back = min(back, batch.length - 1)
    target = batch.length - back
    # a window may have dropped what cropping would need; transformers refuses that as well
    assume(not any(windowed(model, layer) for layer in model.mod.layers))
    with threshold_at_a_gap(model, **batch.inputs()), torch.no_grad():
        expected = model(**batch.inputs(), use_cache=False).logits
        cache = model(**batch.inputs(), use_cache=True).past_key_values
        cache.crop(-back)
        assert cache.get_seq_length() == target
        out = model(**batch.inputs(target), past_key_values=cache, use_cache=True)
    assert_real_equal(out.logits, expected[:, target:], batch.mask[:, target:])
    check_bytes(cache, batch, fresh=False)


def test_the_models_here_do_skip_and_do_keep() -> None:
    """Guards the tests above: with gates all on one side they would show little."""
    ids = torch.randint(0, VOCAB, (3, LONGEST), generator=torch.Generator().manual_seed(0))
    for which in range(len(MODELS)):
        model = build(which)
        with (
            threshold_at_a_gap(model, input_ids=ids),
            torch.no_grad(),
            modlab.record_routing(model) as recording,
        ):
            model(ids, use_cache=False)
        for keep in recording.steps[0].keep.values():
            assert 0 < int(keep[:, 1:].sum()) < keep[:, 1:].numel()
    with pytest.raises(AssertionError):  # and the comparison does notice a difference
        assert_real_equal(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2))
