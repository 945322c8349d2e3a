"""Layers that are given exact room one layer later store and say what they would have with it at once."""

from __future__ import annotations

import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import modlab
from modlab.engine import attention as attention_module
from modlab.engine import deferred as deferred_module
from modlab.engine.attention import KeptKeys, LayerPrefill, LineBlocks, attend_by_head
from modlab.engine.deferred import DeferredLayouts
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingBuffer
from modlab.kernels import kept_attention
from tests.helpers.batches import cases
from tests.helpers.fast_generation import DEVICE, both_ways, generated, llama_on_device, prompts, use_engine
from tests.helpers.models import leaving_llama
from tests.helpers.waits import WAITING, Waits

G, RECENT = 2, 4
"""KV heads and `keep_recent` of these models."""

EVERY_LINE = 10**6


@functools.cache
def model_of(gates: str) -> Any:
    return llama_on_device(skip="kv", gates=gates)


def prefilled(
    model: Any, inputs: dict[str, Tensor], defer_tokens: int, **settings: Any
) -> tuple[Tensor, Any]:
    """Logits and buffers of the prompts, in lines of up to `defer_tokens` tokens deferred."""
    engine = use_engine(model, **settings)
    engine.defer_tokens = defer_tokens
    logits, buffers, _ = prefill(engine, inputs["input_ids"], inputs["attention_mask"])
    modlab.disable_fast_generation(model)
    return logits, buffers


def same(got: Any, want: Any) -> None:
    """Logits, layouts and all that is stored."""
    torch.testing.assert_close(got[0], want[0], rtol=3e-5, atol=3e-5)
    for one, other in zip(got[1], want[1], strict=True):
        assert type(one) is type(other)
        assert (one.lengths, one.starts, one.capacities) == (other.lengths, other.starts, other.capacities)
        if isinstance(one, RingBuffer):
            assert torch.equal(one.ring_kept, other.ring_kept) and one.heads == other.heads
        for tensor, expected in ((one.keys, other.keys), (one.values, other.values)):
            assert tensor.shape == expected.shape
            for start, n in zip(one.starts, one.lengths, strict=True):
                span = slice(start, start + n)
                torch.testing.assert_close(tensor[:, span], expected[:, span], rtol=3e-5, atol=3e-5)


@cases(12)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.6, 1.0]), min_size=G, max_size=G),
    by_head=st.booleans(),
    line_tokens=st.sampled_from([20, 1000]),
    lost_pairs=st.sampled_from([0, 1000, deferred_module.LOST_PAIRS]),
    seed=st.integers(0, 9),
)
def test_prompts_are_stored_as_if_room_had_been_made_at_once(
    lengths: list[int], shares: list[float], by_head: bool, line_tokens: int, lost_pairs: int, seed: int
) -> None:
    """Rows of any lengths, also shorter than what is recent; heads that keep nothing, some or everything;
    layers that wait for their own number after such heads."""
    model, inputs = model_of("kv_head" if by_head else "layer"), prompts(*lengths, seed=seed)
    generator, chance = torch.Generator().manual_seed(seed), torch.tensor(shares[: G if by_head else 1])
    shape = (len(lengths), max(lengths), len(chance))
    masks = {layer: torch.rand(shape, generator=generator) < chance for layer in model.mod.layers}
    if not by_head:
        masks = {layer: mask[..., 0] for layer, mask in masks.items()}
    which_wait = mock.patch.object(deferred_module, "LOST_PAIRS", lost_pairs)
    with modlab.routing_override(model, modlab.RoutingTable(masks)), which_wait:
        want, got = (prefilled(model, inputs, most, line_tokens=line_tokens) for most in (0, EVERY_LINE))
    same(got, want)


@cases(8)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    recent=st.integers(1, 30),
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.6, 1.0]), min_size=1, max_size=3),
    group=st.integers(1, 2),
    by_head=st.booleans(),
    seed=st.integers(0, 9),
)
def test_kernels_read_the_wide_layout_and_its_exact_room_is_that_of_the_other_way(
    counts: list[int], recent: int, shares: list[float], group: int, by_head: bool, seed: int
) -> None:
    """The way of a GPU, its kernels in the interpreter where there is none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    heads, H, S, generator = len(shares), 16, sum(counts), torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, S, H, generator=generator).to(DEVICE) for n in (heads * group, heads, heads))
    chance = torch.tensor(shares[: heads if by_head else 1])
    keep = (torch.rand(S, len(chance), generator=generator) < chance).to(DEVICE)
    bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
    blocks, size = LineBlocks(counts, DEVICE), kept_attention.block_size(q, v)
    kept = KeptKeys(keep, bounds, recent, blocks)

    def stored(older: list[int]) -> tuple[RingBuffer, kept_attention.Stored]:
        buffer = RingBuffer()
        laid_out = buffer.lay_out(counts, older, kept.before, recent, k[0], v[0], blocks.sent)
        kept_attention.store_kept(k, v, blocks.of(size), size, laid_out)
        return buffer, laid_out

    exact, _ = stored(kept.older.read())
    most = [max(n - recent, 0) for n in counts for _ in chance]
    wide, laid_out = stored(most)
    part = LayerPrefill(wide, counts, torch.arange(S, device=DEVICE), bounds, False, kept)
    got = attend_by_head(part, blocks, laid_out, [False] * len(chance), q, k, v, None)
    want = kept_attention.reference_kept_attention(q, k, v, keep, counts, recent, None)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    wide.shrink(kept.older.read())
    same((got, [wide]), (want, [exact]))


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_texts_go_on_the_same(gates: str) -> None:
    model = model_of(gates)
    for inputs in (prompts(30, 3, 12), prompts(60), prompts(2)):
        engine = use_engine(model)
        want = generated(model, inputs)
        engine.defer_tokens = EVERY_LINE
        assert generated(model, inputs) == want
        modlab.disable_fast_generation(model)
        both_ways(model, inputs)


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_where_tokens_leave_the_layers_below_are_deferred(
    gates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = leaving_llama("kv+prompt", gates).to(DEVICE)
    inputs, deferred = prompts(30, 3, 12), noted(monkeypatch)
    want = prefilled(model, inputs, 0)
    assert not deferred
    same(prefilled(model, inputs, EVERY_LINE), want)
    assert 0 < len(deferred) < len(model.mod.layers)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[RingBuffer]:
    """Buffers of the layers that are deferred, as they come."""
    buffers: list[RingBuffer] = []
    add = DeferredLayouts.add

    def noting(self: DeferredLayouts, buffer: RingBuffer, older: Any) -> None:
        buffers.append(buffer)
        add(self, buffer, older)

    monkeypatch.setattr(DeferredLayouts, "add", noting)
    return buffers


def nothing(layer: int, gate: Tensor, positions: Tensor) -> Tensor:
    return torch.zeros_like(gate, dtype=torch.bool)


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_no_more_than_one_layer_is_held_dense(gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, deferred = model_of(gates), prompts(60, 41), noted(monkeypatch)
    dense: list[int] = []
    lay_out = RingBuffer.lay_out

    def noting(self: RingBuffer, *args: Any) -> Any:
        dense.append(sum(max(buffer.lengths) > RECENT for buffer in deferred))
        return lay_out(self, *args)

    monkeypatch.setattr(RingBuffer, "lay_out", noting)
    with modlab.routing_override(model, nothing):
        prefilled(model, inputs, EVERY_LINE)
    assert len(deferred) == len(model.mod.layers) > 1 and set(dense) == {0}
    assert all(max(buffer.lengths) == RECENT for buffer in deferred)
    assert all(buffer.keys is not None and buffer.keys.shape[1] == buffer.capacity for buffer in deferred)


def by_layer(shares: list[float]) -> Any:
    """In each routed layer that share of the heads keeps everything, the others nothing; with a gate a layer
    it is 0 or 1."""

    def keep(layer: int, gate: Tensor, positions: Tensor) -> Tensor:
        heads = torch.arange(gate.shape[-1] if gate.dim() == 3 else 1, device=gate.device)
        open_heads = heads < shares[(layer - 1) // 2] * len(heads)
        return (open_heads if gate.dim() == 3 else open_heads[0]).expand(gate.shape)

    return keep


@pytest.mark.parametrize(
    ("gates", "shares", "deferred_layers"),
    [
        ("layer", [1.0, 1.0, 1.0], 1),
        ("layer", [1.0, 0.0, 1.0], 2),  # the second asks, as the first kept all; the third does not
        ("layer", [0.0, 0.0, 1.0], 3),
        ("kv_head", [1.0, 1.0, 1.0], 1),
        ("kv_head", [0.5, 0.5, 0.5], 3),  # half of the heads are not enough
        ("kv_head", [0.5, 1.0, 0.5], 2),
    ],
)
def test_after_a_layer_whose_heads_keep_everything_the_next_one_asks_at_once(
    gates: str, shares: list[float], deferred_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, deferred = model_of(gates), prompts(60), noted(monkeypatch)
    assert len(model.mod.layers) == len(shares)
    monkeypatch.setattr(deferred_module, "LOST_PAIRS", 60**2 // 2)
    with modlab.routing_override(model, by_layer(shares)):
        want = prefilled(model, inputs, 0)
        first, second = (prefilled(model, inputs, EVERY_LINE) for _ in range(2))
    assert len(deferred) == 2 * deferred_layers, "whatever ran before"
    same(first, want)
    assert torch.equal(first[0], second[0])


def test_rows_that_lose_little_are_deferred_with_all_heads_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones, and those that have nothing but recent tokens, of which it is known in time."""
    model, deferred, layers = model_of("kv_head"), noted(monkeypatch), len(model_of("kv_head").mod.layers)
    monkeypatch.setattr(deferred_module, "LOST_PAIRS", 60**2 // 2)
    with modlab.routing_override(model, by_layer([1.0] * layers)):
        prefilled(model, prompts(30, 30), EVERY_LINE)
        assert len(deferred) == layers
        monkeypatch.setattr(deferred_module, "LOST_PAIRS", 0)
        prefilled(model, prompts(RECENT, RECENT), EVERY_LINE)
    assert len(deferred) == 2 * layers


def test_a_layer_that_keeps_everything_is_not_copied() -> None:
    buffer, keys = RingBuffer(), torch.randn(2, 20, 8)
    before = torch.arange(21, dtype=torch.int32)[None]
    buffer.lay_out([20], [16], before, RECENT, keys, keys, torch.tensor)
    stored = buffer.keys
    buffer.shrink([16])
    assert buffer.keys is stored and buffer.lengths == [20]


def test_longer_lines_and_bounded_caches_are_laid_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, deferred = model_of("layer"), prompts(30, 12), noted(monkeypatch)
    prefilled(model, inputs, 41)
    assert not deferred
    prefilled(model, inputs, 42)
    assert len(deferred) == len(model.mod.layers)
    engine = use_engine(model, kv_tokens=12)
    engine.defer_tokens = EVERY_LINE
    deferred.clear()
    prefill(engine, inputs["input_ids"], inputs["attention_mask"], most_older=8)
    assert not deferred
    modlab.disable_fast_generation(model)


def test_by_default_it_is_for_gpus() -> None:
    model = model_of("layer")
    assert use_engine(model).defer_tokens == (deferred_module.MOST_TOKENS if DEVICE.type == "cuda" else 0)
    modlab.disable_fast_generation(model)


class Order(Waits):
    """Notes waits and the linear maps that come between them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING or func is torch.nn.functional.linear:
            self.seen += "x" if func is torch.nn.functional.linear else "w"
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="routers run as kernels there")
@pytest.mark.parametrize("gates", ["layer", "kv_head"])
def test_the_host_waits_for_a_layer_when_the_next_one_has_come_to_its_attention(
    gates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = attention_module.reference_store_kept

    def uncounted(*args: Any) -> None:
        with torch._C.DisableTorchFunction():
            reference(*args)

    monkeypatch.setattr(attention_module, "reference_store_kept", uncounted)
    model, inputs = model_of(gates), prompts(30)
    engine = use_engine(model)
    engine.defer_tokens = EVERY_LINE
    with Order() as order:
        prefill(engine, inputs["input_ids"], None)
    modlab.disable_fast_generation(model)
    # Every other layer is routed: its router, q, k, v, a wait for the one before it, output projection, MLP.
    dense, first, later = "xxx" + "xxxx", "xxxx" + "xxxx", "xxxx" + "w" + "xxxx"
    assert order.seen == dense + first + (dense + later) * (len(model.mod.layers) - 1) + "x" + "w"


@pytest.mark.parametrize(
    ("counts", "open_heads", "waits"),
    [
        ([4096], 4, False), ([4096], 5, True), ([8192], 1, False), ([8192], 2, True), ([2896], 8, False),
        ([2897], 8, True), ([2048] * 4, 4, False), ([4096] * 2, 3, True),
    ],
)  # fmt: skip
def test_how_many_open_heads_make_a_layer_wait_depends_on_the_rows(
    counts: list[int], open_heads: int, waits: bool
) -> None:
    """Of eight heads, as CHANGELOG.md says: more than half in one row of 4,096 tokens, an eighth in one of
    8,192, never below 2,897. Rows count by their squares."""
    deferred = DeferredLayouts(counts)
    deferred.learn([True] * open_heads + [False] * (8 - open_heads))
    assert deferred.next_one_waits == waits
