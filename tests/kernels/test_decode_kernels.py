"""The Triton kernels of a decoding step against their plain references, on whatever device is there.

Without a GPU they run in Triton's interpreter (conftest sets TRITON_INTERPRET), so that the code of the
kernels, not only their idea, is checked everywhere.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import modlab
from modlab.cache.buffer import SegmentedBuffer
from modlab.kernels import decode_attention as attention
from modlab.kernels import decode_linear as linear
from modlab.kernels import decode_router as router
from modlab.kernels import kept_attention as kept
from modlab.kernels import ring_budget, router_logits
from modlab.kernels.kept_attention import Stored
from modlab.routing.router import HiddenRouter, make_router

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's dot misreads bfloat16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def filled_layer(
    lengths: list[int], G: int, HK: int, HV: int, dtype: torch.dtype, seed: int
) -> SegmentedBuffer:
    """A buffer of random keys and values; every place that holds no token is NaN."""
    generator = torch.Generator().manual_seed(seed)
    layer = SegmentedBuffer()
    like = torch.empty(1, G, 0, 1, dtype=dtype, device=DEVICE)
    capacities = [n + layer.slack(n) for n in lengths]
    layer.reserve(capacities, like.expand(1, G, 0, HK), like.expand(1, G, 0, HV))
    assert layer.keys is not None and layer.values is not None and layer.columns is not None
    layer.keys.fill_(torch.nan)
    layer.values.fill_(torch.nan)
    layer.columns.fill_(-1)
    for start, n in zip(layer.starts, lengths, strict=True):
        for buffer in (layer.keys, layer.values):
            values = torch.randn(G, n, buffer.shape[2], generator=generator)
            buffer[:, start : start + n] = values.to(DEVICE, dtype)
        layer.columns[start : start + n] = torch.arange(n, device=DEVICE, dtype=torch.int32)
    layer.lengths = list(lengths)
    return layer


def address_table(layer: SegmentedBuffer) -> Tensor:
    assert layer.keys is not None and layer.values is not None and layer.columns is not None
    addresses = [t.data_ptr() for t in (layer.keys, layer.values, layer.columns)]
    return torch.tensor([*addresses, layer.columns.numel(), 0, 0, *layer.starts], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(
    ("lengths", "keep", "G", "M", "HK", "HV"),
    [
        ([0], [True], 1, 1, 16, 16),  # the first token ever
        ([1], [True], 2, 4, 32, 32),
        ([127], [False], 2, 2, 32, 32),  # nothing to do
        ([63, 64, 65], [True, True, True], 2, 3, 32, 32),  # around a block
        ([300, 0, 129, 5], [True, False, True, True], 2, 4, 64, 64),
        (
            [257, 31],
            [True, True],
            1,
            8,
            48,
            24,
        ),  # no powers of two, keys wider than values
        ([40 + 9 * i for i in range(11)], [i % 3 != 1 for i in range(11)], 1, 2, 16, 16),
    ],
    ids=["first", "second", "skipped", "blocks", "ragged", "odd-heads", "many-rows"],
)
@pytest.mark.parametrize(("joined", "tile"), [(4, -1), (64, 0)])
def test_attention_equals_its_reference(
    lengths: list[int],
    keep: list[bool],
    G: int,
    M: int,
    HK: int,
    HV: int,
    joined: int,
    tile: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a head has more pieces than are joined at once, and in the tile of the smallest GPUs."""
    monkeypatch.setattr(attention, "JOINED", joined)
    for name in ("TILES", "SMALL_TILES"):
        monkeypatch.setattr(attention, name, getattr(attention, name)[tile:])
    B, N = len(lengths), G * M
    generator = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(B, heads, size, generator=generator).to(DEVICE, dtype)
        for heads, size in ((N, HK), (G, HK), (G, HV))
    )
    keep_B = torch.tensor(keep, device=DEVICE)
    column_B = torch.arange(B, dtype=torch.int32, device=DEVICE) + 1000
    want_layer, got_layer = (filled_layer(lengths, G, HK, HV, dtype, seed=3) for _ in range(2))
    want_lengths, got_lengths = (torch.tensor(lengths, dtype=torch.int32, device=DEVICE) for _ in range(2))
    scale = HK**-0.5
    buffers = (want_layer.keys, want_layer.values, want_layer.columns)
    want = attention.reference_decode_attention(
        q, k, v, buffers, want_layer.starts, want_lengths, keep_B, column_B, scale
    )
    got = attention.decode_attention(q, k, v, address_table(got_layer), got_lengths, keep_B, column_B, scale)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (
        got_lengths.tolist() == want_lengths.tolist() == [n + k for n, k in zip(lengths, keep, strict=True)]
    )
    for name in ("keys", "values", "columns"):  # appended in place, and nothing else was touched
        torch.testing.assert_close(
            getattr(got_layer, name), getattr(want_layer, name), rtol=0, atol=0, equal_nan=True
        )


def test_attention_follows_a_buffer_that_moves() -> None:
    """Steps with a growth in between, through the same table object, as a captured graph sees it."""
    G, H = 2, 16
    layer, twin = (filled_layer([3, 30], G, H, H, torch.float32, seed=1) for _ in range(2))
    lengths, twin_lengths = (torch.tensor([3, 30], dtype=torch.int32, device=DEVICE) for _ in range(2))
    table, keep = address_table(layer), torch.tensor([True, True], device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    for step in range(10):
        if step == 4:
            layer.lengths = lengths.tolist()
            layer.grow()
            table.copy_(address_table(layer))
        q, k, v = (torch.randn(2, n, H, generator=generator).to(DEVICE) for n in (4, G, G))
        column = torch.full((2,), 50 + step, dtype=torch.int32, device=DEVICE)
        buffers = (twin.keys, twin.values, twin.columns)
        if step == 7:
            twin.lengths = twin_lengths.tolist()
            twin.grow()
            buffers = (twin.keys, twin.values, twin.columns)
        want = attention.reference_decode_attention(
            q, k, v, buffers, twin.starts, twin_lengths, keep, column, H**-0.5
        )
        got = attention.decode_attention(q, k, v, table, lengths, keep, column, H**-0.5)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(
    ("W", "positions", "G", "M", "HK", "HV"),
    [
        (1, [0, 4], 1, 1, 16, 16),  # no recent token but itself
        (4, [0, 3, 4, 11], 2, 2, 16, 16),
        (5, [40], 1, 8, 48, 24),
        (130, [126, 300], 2, 3, 32, 32),  # more than a block of keys
    ],
    ids=["alone", "filling", "odd-heads", "blocks"],
)
def test_ring_attention_equals_its_reference(
    W: int, positions: list[int], G: int, M: int, HK: int, HV: int, dtype: torch.dtype
) -> None:
    """Steps enough to turn every ring once; what is stored, and what of it is kept, stay the same too."""
    B, N = len(positions), G * M
    generator = torch.Generator().manual_seed(7)
    ring_kept = torch.rand(B, W, generator=generator) < 0.5
    lengths = [min(p, W) + (p - W) // 2 * (p > W) for p in positions]
    layers = [filled_layer(lengths, G, HK, HV, dtype, seed=3) for _ in range(2)]
    rings = [ring_kept.to(DEVICE).clone() for _ in range(2)]
    counted = [torch.tensor(lengths, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    table, scale = address_table(layers[1]), HK**-0.5
    for step in range(min(W + 2, 12)):
        q, k, v = (
            torch.randn(B, heads, size, generator=generator).to(DEVICE, dtype)
            for heads, size in ((N, HK), (G, HK), (G, HV))
        )
        keep = (torch.rand(B, generator=generator) < 0.5).to(DEVICE)
        position = torch.tensor(positions, device=DEVICE) + step
        buffers = (layers[0].keys, layers[0].values)
        want = attention.reference_decode_ring_attention(
            q, k, v, buffers, layers[0].starts, counted[0], keep, rings[0], position, scale
        )
        got = attention.decode_ring_attention(q, k, v, table, counted[1], keep, rings[1], position, scale)
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert torch.equal(*counted) and torch.equal(*rings)
    for name in ("keys", "values"):
        torch.testing.assert_close(
            getattr(layers[1], name), getattr(layers[0], name), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
def test_heads_are_rows_of_a_ring(dtype: torch.dtype) -> None:
    """Two rows of three KV heads, each with a ring of its own, from empty to far longer than others."""
    W, H, rows, G, M = 5, 16, 2, 3, 2
    generator = torch.Generator().manual_seed(11)
    older = [0, 300, 3, 40, 0, 0]
    positions = torch.tensor([400, 3], device=DEVICE)
    lengths = [n + W for n in older[:3]] + [3, 3, 3]
    layers = [filled_layer(lengths, 1, H, H, dtype, seed=3) for _ in range(2)]
    rings = [(torch.arange(rows * G * W).view(rows * G, W) % 3 == 0).to(DEVICE) for _ in range(2)]
    counted = [torch.tensor(lengths, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for step in range(8):
        q, k, v = (
            torch.randn(rows, heads, H, generator=generator).to(DEVICE, dtype) for heads in (G * M, G, G)
        )
        keep = (torch.rand(rows * G, generator=generator) < 0.5).to(DEVICE)
        new = [attention.fold(t, rows * G) for t in (q, k, v)]
        assert [t.shape[1] for t in new] == [M, 1, 1]
        buffers = (layers[0].keys, layers[0].values)
        want = attention.reference_decode_ring_attention(
            *new, buffers, layers[0].starts, counted[0], keep, rings[0], positions + step, 0.3
        )
        got = attention.decode_ring_attention(
            *new, address_table(layers[1]), counted[1], keep, rings[1], positions + step, 0.3
        )
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert torch.equal(*counted) and torch.equal(*rings)
    for name in ("keys", "values"):
        torch.testing.assert_close(
            getattr(layers[1], name), getattr(layers[0], name), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(("most", "gates"), [(0, 1), (1, 2), (3, 1)])
def test_a_row_that_is_full_gives_up_its_lowest_gate(most: int, gates: int) -> None:
    """Kernels and references step by step, and at the end what a sort of all gates says is left."""
    W, H, rows, T = 3, 16, 2, 14
    U, generator = rows * gates, torch.Generator().manual_seed(most)
    lengths, capacity = [0] * U, W + most
    layers = [filled_layer(lengths, 1, H, H, torch.float32, seed=3) for _ in range(2)]
    for layer in layers:
        layer.rearrange(layer.rows, [capacity] * U)
    scores = [torch.full((U * capacity,), torch.nan, device=DEVICE) for _ in range(2)]
    rings = [torch.zeros(U, W, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    counted = [torch.zeros(U, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    budgets = [
        ring_budget.RingBudget(
            scores_UW=torch.full((U, W), torch.nan, device=DEVICE),
            place_U=torch.zeros(U, dtype=torch.int32, device=DEVICE),
            most_1=torch.tensor([most], dtype=torch.int32, device=DEVICE),
            keep_first=1,
        )
        for _ in range(2)
    ]
    table = address_table(layers[1])
    table[ring_budget.SCORES] = scores[1].data_ptr()
    gate_TU = torch.rand(T, U, generator=generator).to(DEVICE)
    keep_TU = gate_TU > 0.3
    keep_TU[0] = True
    keys_TU = torch.randn(T, U, H, generator=generator).to(DEVICE)
    for t in range(T):
        position = torch.full((rows,), t, device=DEVICE)
        q = torch.randn(U, 2, H, generator=generator).to(DEVICE)
        new = (q, keys_TU[t][:, None], -keys_TU[t][:, None])
        ring_budget.reference_make_room(
            budgets[0], scores[0], layers[0].starts, counted[0], rings[0], gate_TU[t], position
        )
        ring_budget.make_room(
            table, counted[1], rings[1], gate_TU[t], position, budgets[1].scores_UW, budgets[1].place_U,
            budgets[1].most_1, 1,
        )  # fmt: skip
        assert torch.equal(budgets[0].place_U, budgets[1].place_U)
        buffers, keep = (layers[0].keys, layers[0].values), keep_TU[t]
        want = attention.reference_decode_ring_attention(
            *new, buffers, layers[0].starts, counted[0], keep, rings[0], position, 0.3, budgets[0].place_U
        )
        got = attention.decode_ring_attention(
            *new, table, counted[1], keep, rings[1], position, 0.3, budgets[1].place_U
        )
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        assert torch.equal(*counted) and torch.equal(*rings)
        for unit in range(U):  # what is stored: the ring, and of the older ones the first and the best
            old = [s for s in range(t + 1 - W) if keep_TU[s, unit]]
            best = sorted(old, key=lambda s: (s > 0, -float(gate_TU[s, unit])))[:most]
            stored = {*best, *range(max(t + 1 - W, 0), t + 1)}
            start, n = layers[1].starts[unit], int(counted[1][unit])
            found = layers[1].keys[0, start : start + n].cpu()
            places = {int((keys_TU[:, unit].cpu() == key).all(-1).nonzero()[0, 0]) for key in found}
            assert places == stored and n == len(stored) <= capacity
            weights = (keys_TU[sorted(stored), unit] @ q[unit].T * 0.3).softmax(0)
            values = -keys_TU[sorted(stored), unit]
            torch.testing.assert_close(got[unit], weights.T @ values, atol=2e-5, rtol=2e-5)


def test_a_ring_sees_recent_and_kept_tokens_and_no_others() -> None:
    """The reference against a softmax over the tokens that the rule names, told apart by their values."""
    W, T, H = 3, 20, 16
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, T, H, generator=generator)
    keep = torch.rand(T, generator=generator) < 0.4
    layer = filled_layer([0], 1, H, H, torch.float32, seed=1)
    layer.rearrange([0], [T])
    ring, lengths = torch.zeros(1, W, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
    buffers = (layer.keys.cpu(), layer.values.cpu())
    for t in range(T):
        q = torch.randn(1, 1, H, generator=generator)
        new = (keys[t][None, None], values[t][None, None])
        got = attention.reference_decode_ring_attention(
            q, *new, buffers, [0], lengths, keep[t : t + 1], ring, torch.tensor([t]), 1.0
        )
        seen = [s for s in range(t + 1) if keep[s] or t - s < W]
        weights = (keys[seen] @ q[0, 0]).softmax(0)
        torch.testing.assert_close(got[0, 0], weights @ values[seen], atol=1e-5, rtol=1e-5)
        assert int(lengths[0]) == len(seen)


def laid_out(keep: Tensor, counts: list[int], G: int, HK: int, HV: int, W: int, like: Tensor) -> Stored:
    """An empty cache for these kept tokens, its segments with a gap of NaN behind each."""
    before = kept.kept_before(keep)
    older = kept.older_kept(before, kept.older_spans(counts, W).to(DEVICE)).tolist()
    gates = len(before)
    lengths = [min(n, W) + old for n, old in zip(np.repeat(counts, gates).tolist(), older, strict=True)]
    starts = torch.tensor([0, *(n + 3 for n in lengths)]).cumsum(0)
    keys, values = (like.new_full((G if gates == 1 else 1, int(starts[-1]), H), torch.nan) for H in (HK, HV))
    ring = torch.zeros(len(lengths), W, dtype=torch.bool, device=DEVICE)
    return Stored(keys, values, starts[:-1].to(DEVICE), ring, before)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(
    ("share", "tile"),
    [(0.0, "usual"), (0.3, "usual"), (1.0, "usual"), ("heads", "usual"), ("heads", "smallest")],
)
@pytest.mark.parametrize(
    ("counts", "W", "G", "M", "HK", "HV"),
    [
        ([1], 1, 1, 1, 16, 16),
        ([37, 1, 33], 4, 2, 2, 32, 32),
        ([150], 140, 1, 3, 16, 16),
        ([70, 140], 9, 3, 2, 48, 24),
    ],
    ids=["one", "rows", "wide-ring", "odd-heads"],
)
def test_prefill_with_kept_keys_equals_its_reference(
    counts: list[int],
    W: int,
    G: int,
    M: int,
    HK: int,
    HV: int,
    share: float | str,
    dtype: torch.dtype,
    tile: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One gate, or one a head that keeps from nothing to everything: the cache, and the attention to it."""
    if tile == "smallest":
        for name in ("TILES", "SMALL_TILES"):
            monkeypatch.setattr(kept, name, getattr(kept, name)[-1:] * 2)
    generator, S = torch.Generator().manual_seed(sum(counts)), sum(counts)
    q, k, v = (
        torch.randn(1, S, heads, size, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for heads, size in ((G * M, HK), (G, HK), (G, HV))
    )
    chance = torch.linspace(0, 1, G) if share == "heads" else torch.tensor(share)
    keep = (torch.rand(S, G if share == "heads" else 1, generator=generator) < chance).to(DEVICE)
    want_stored, got_stored = (laid_out(keep, counts, G, HK, HV, W, k) for _ in range(2))
    kept.reference_store_kept(k, v, counts, want_stored)
    size = kept.block_size(q, v)
    blocks = kept.query_blocks(counts, size).to(DEVICE)
    kept.store_kept(k, v, blocks, size, got_stored)
    for name in ("keys", "values", "ring_kept_UW"):
        torch.testing.assert_close(
            getattr(got_stored, name), getattr(want_stored, name), rtol=0, atol=0, equal_nan=True
        )
    out = torch.full((1, S, G * M, HV), torch.nan, dtype=dtype, device=DEVICE)
    heads = torch.arange(G, dtype=torch.int32, device=DEVICE)
    got = kept.kept_attention(q, k, v, got_stored, blocks, size, None, heads, out)
    want = kept.reference_kept_attention(q, k, v, keep, counts, W, None)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_attention_to_kept_keys_of_some_heads_leaves_the_others_alone() -> None:
    S, W, G, M, H = 40, 5, 3, 2, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, S, H, generator=generator).to(DEVICE) for n in (G * M, G, G))
    keep = (torch.rand(S, G, generator=generator) < 0.4).to(DEVICE)
    stored = laid_out(keep, [S], G, H, H, W, k)
    kept.reference_store_kept(k, v, [S], stored)
    blocks = kept.query_blocks([S], 32).to(DEVICE)
    out = torch.full((1, S, G * M, H), 7.0, device=DEVICE)
    some = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    kept.kept_attention(q, k, v, stored, blocks, 32, None, some, out)
    want = kept.reference_kept_attention(q, k, v, keep, [S], W, None)
    want[:, :, M : 2 * M] = 7.0
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)


def test_query_blocks_cover_every_row_once() -> None:
    blocks = kept.query_blocks([70, 1, 0, 64], 32).tolist()
    covered = sorted(place for first, _, end, _ in blocks for place in range(first, min(first + 32, end)))
    assert covered == list(range(135))
    rows = {(begin, end, row) for _, begin, end, row in blocks}
    assert rows == {(0, 70, 0), (70, 71, 1), (71, 135, 3)}
    assert [first - begin for first, begin, _, _ in blocks] == [64, 32, 32, 0, 0, 0]  # most work first


def router_call(
    B: int, D: int, forced: str, bias: float = 0.1, gates: int = 1, hidden: int = 0
) -> router.RouterCall:
    """Of random weights; `forced` by no table ("gate"), by one for all gates, or one for each."""
    P = 40
    generator = torch.Generator().manual_seed(B)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE) * 0.2

    answers = gates if forced == "each" else 1
    table = (torch.rand(B, P, *[answers] * (answers > 1), generator=generator) < 0.4).to(DEVICE)
    by_table = forced != "gate"
    shape = (B,) if gates == 1 else (B, gates)
    return router.RouterCall(
        x_BD=torch.randn(B, D, generator=generator).to(DEVICE, HALF) * 3,
        weight=random(D) if gates == 1 else random(gates, D),
        bias_A=torch.full((gates,), bias, device=DEVICE) + random(gates) * 0.01,
        threshold_1=torch.tensor([0.5], device=DEVICE),
        position_B=(torch.arange(B) * 7).to(DEVICE),  # beyond the table from row 6 on
        keep_first=4,
        forced=table if by_table else None,
        forced_3=torch.tensor([table.data_ptr(), P, answers] if by_table else [0, 0, 0], device=DEVICE),
        gate=torch.full(shape, torch.nan, device=DEVICE),
        keep=torch.zeros(shape, dtype=torch.bool, device=DEVICE),
        any_1=torch.zeros(1, dtype=torch.bool, device=DEVICE),
        into_UD=random(hidden, D) if hidden else None,
        out_AU=random(gates, hidden) * 5 if hidden else None,
    )


WIDE = [(1, 0), (1, 16), (3, 0), (8, 16), (5, 7), (2, 64)]
"""Gates and hidden units."""


@pytest.mark.parametrize(("gates", "hidden"), WIDE, ids=str)
@pytest.mark.parametrize("B", [1, 3, 17])
@pytest.mark.parametrize("forced", ["gate", "all", "each"])
def test_router_equals_its_reference(B: int, forced: str, gates: int, hidden: int) -> None:
    got, want = (router_call(B, 100, forced, gates=gates, hidden=hidden) for _ in range(2))
    router.decode_router(got)
    router.reference_decode_router(want)
    torch.testing.assert_close(got.gate, want.gate, atol=1e-5, rtol=1e-5)
    assert got.keep.tolist() == want.keep.tolist()
    assert bool(got.any_1) == bool(want.any_1)
    assert B < 3 or 0 < int(want.keep.sum()) < want.keep.numel(), "some should be kept"


@pytest.mark.parametrize(("gates", "hidden"), WIDE, ids=str)
def test_a_step_decides_as_the_router_of_the_model_does(gates: int, hidden: int) -> None:
    call = router_call(5, 64, "gate", gates=gates, hidden=hidden)
    made = make_router(modlab.MoDConfig(router_hidden=hidden), 64, gates, DEVICE)
    made.weight.data, made.bias.data = call.weight, call.bias_A
    if isinstance(made, HiddenRouter) and call.into_UD is not None and call.out_AU is not None:
        made.into.data, made.out.data = call.into_UD, call.out_AU
    router.reference_decode_router(call)
    with torch.no_grad():
        want = made(call.x_BD[:, None])[:, 0].sigmoid()
    torch.testing.assert_close(call.gate, want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("B", [1, 2, 3, 17, 32, 40])
@pytest.mark.parametrize("forced", ["gate", "all"])
@pytest.mark.parametrize("hidden", [0, 16, 64])
def test_router_inside_a_graph_equals_its_reference(B: int, forced: str, hidden: int) -> None:
    """The kernel that also sets the IF node's condition: whether the body ran is what it decided."""
    from modlab.engine.branch import HostBranch, choose_branch

    branch, note = choose_branch(DEVICE)
    assert not isinstance(branch, HostBranch), note
    for D in (100, 4096):
        for bias in (0.1, -100.0):  # the second: nobody keeps, but for the first tokens
            got, want = (router_call(B, D, forced, bias, hidden=hidden) for _ in range(2))
            ran = torch.zeros(1, device=DEVICE)
            ran.add_(1.0)  # loads its kernel, which a capture may not
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="relaxed"):
                decided = branch.decide(graph, got)
                torch.zeros(1, device=DEVICE)  # the node may come later in the graph than the decision
                branch.run_decided(graph, decided, lambda ran=ran: ran.add_(1.0))
            ran.zero_()
            graph.replay()
            router.reference_decode_router(want)
            torch.testing.assert_close(got.gate, want.gate, atol=1e-5, rtol=1e-5)
            assert got.keep.tolist() == want.keep.tolist()
            assert bool(ran) == bool(got.any_1) == bool(want.any_1)


def test_router_says_nobody_when_nobody_keeps() -> None:
    call = router_call(2, 64, "gate", bias=-100.0)
    call.position_B += 4
    call.keep.fill_(True)
    call.any_1.fill_(True)
    router.decode_router(call)
    assert not call.keep.any() and not call.any_1


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("D", "E", "bias"), [(16, 5, True), (1024, 3, False), (1500, 4, True)])
def test_linear_equals_its_reference(D: int, E: int, bias: bool, dtype: torch.dtype) -> None:
    check_linear((1, 1), D, E, bias, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("D", "E", "bias"), [(16, 5, True), (512, 32, False), (600, 40, True)])
@pytest.mark.parametrize("shape", [(2, 1), (7, 1), (16, 1), (1, 1, 3)], ids=str)
def test_linear_of_several_rows_equals_its_reference(
    D: int, E: int, bias: bool, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "FEW_OUTPUTS", 32)
    check_linear(shape, D, E, bias, dtype)


def check_linear(shape: tuple[int, ...], D: int, E: int, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(D)
    x, weight, b = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((*shape, D), (E, D), (E,))
    )
    bias_E = b if bias else None
    got = linear.decode_linear(x, weight, bias_E)
    want = linear.reference_decode_linear(x.double(), weight.double(), None if bias_E is None else b.double())
    assert got.shape == (*shape, E) and got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * 8, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("S", "D"), [(1, 16), (15, 48), (16, 512), (17, 600), (70, 1024), (520, 48)])
@pytest.mark.parametrize(("gates", "hidden"), WIDE, ids=str)
def test_logits_of_a_prefill_equal_the_routers_own(
    gates: int, hidden: int, S: int, D: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(S)
    own = make_router(modlab.MoDConfig(router_hidden=hidden, init_gate=0.7), D, gates, DEVICE)
    for parameter in own.parameters():
        scale = parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator).to(DEVICE) * scale
    wide = torch.full((1, S, D + 8), torch.nan)
    wide[..., :D] = torch.randn(1, S, D, generator=generator)
    x = wide.to(DEVICE, dtype)[..., :D]  # rows with something else between them
    with torch.no_grad():
        want = own(x)
        for tile in (None, router_logits.Tile(32, 64, shares=1), router_logits.Tile(16, 32, shares=3)):
            got = router_logits.kernel_router_logits(own, x, tile)
            assert got.dtype == torch.float32 and got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_prefills_router_has_tiles_by_its_tokens_and_columns() -> None:
    short, long = router_logits.SHORT, router_logits.LONG
    assert (
        router_logits.usual_tile(4096, 32, 132) == short and router_logits.usual_tile(8448, 32, 132) == long
    )
    assert router_logits.usual_tile(8447, router_logits.MOST_COLUMNS, 132) == short
    for tokens in (4096, 8448):
        assert router_logits.usual_tile(tokens, 96, 132).inputs == 64, "weights of wide routers fill it"


@pytest.mark.parametrize(
    ("gates", "hidden", "by"),
    [(1, 0, "kernel"), (64, 64, "kernel"), (1, 65, "own"), (8, 256, "own"), (65, 0, "own")],
)
def test_routers_too_wide_for_shared_memory_run_their_own_forward(
    gates: int, hidden: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/kernels/test_kernel_builds.py builds the widest that the kernel is used for."""
    own = make_router(modlab.MoDConfig(router_hidden=hidden), 32, gates, torch.device("cpu"))
    monkeypatch.setattr(router_logits, "kernel_router_logits", lambda router, x: "kernel")
    monkeypatch.setattr(own, "forward", lambda x: "own")
    on_a_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, stride=lambda dim: 1)
    assert router_logits.router_logits(own, on_a_gpu) == by
