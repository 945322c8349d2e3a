"""The Triton kernels of a decoding step against their plain references, on whatever device is there.

Without a GPU they run in Triton's interpreter (conftest sets TRITON_INTERPRET), so that the code of the
kernels, not only their idea, is checked everywhere.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.kernels import decode_attention as attention
from modlab.kernels import decode_linear as linear
from modlab.kernels import decode_router as router
from modlab.kernels import kept_attention, router_logits
from modlab.routing.router import Router

pytest.importorskip("triton", reason="Triton is not installed")

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
    return torch.tensor([*addresses, layer.columns.numel(), *layer.starts], device=DEVICE)


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
def test_attention_equals_its_reference(
    lengths: list[int], keep: list[bool], G: int, M: int, HK: int, HV: int, dtype: torch.dtype
) -> None:
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


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_parts_fill_the_multiprocessors(kv_heads: int) -> None:
    """However many rows keep, the last wave of programs is nearly full."""
    for live in range(1, 65):
        parts = attention.parts_of(live, kv_heads, multiprocessors=132)
        waves = live * kv_heads * parts / 132
        assert waves / -(-waves // 1) >= 0.84 or parts == attention.MAX_PARTS, (live, parts)
        assert attention.MIN_PARTS <= parts <= attention.MAX_PARTS


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


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("counts", "W", "G", "M", "HK", "HV"),
    [
        ([1], 1, 1, 1, 16, 16),
        ([37, 1, 33], 4, 2, 2, 32, 32),
        ([150], 140, 1, 3, 16, 16),
        ([70, 140], 9, 1, 2, 48, 24),
    ],
    ids=["one", "rows", "wide-ring", "odd-heads"],
)
def test_prefill_with_kept_keys_equals_its_reference(
    counts: list[int], W: int, G: int, M: int, HK: int, HV: int, share: float, dtype: torch.dtype
) -> None:
    generator, S = torch.Generator().manual_seed(sum(counts)), sum(counts)
    q, k, v = (
        torch.randn(1, S, heads, size, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for heads, size in ((G * M, HK), (G, HK), (G, HV))
    )
    keep = (torch.rand(S, generator=generator) < share).to(DEVICE)
    bounds = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    kept = kept_attention.gather_kept(k, v, keep, bounds, W)
    rows = keep.split(counts)
    assert kept.per_row == [int(row.sum()) for row in rows]
    assert kept.older == [int(row[: max(len(row) - W, 0)].sum()) for row in rows]
    got = kept_attention.kept_attention(q, k, v, kept, counts, bounds, W, None)
    want = kept_attention.reference_kept_attention(q, k, v, keep, counts, W, None)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def router_call(B: int, D: int, forced: bool, bias: float = 0.1) -> router.RouterCall:
    P = 40
    generator = torch.Generator().manual_seed(B)
    table = (torch.rand(B, P, generator=generator) < 0.4).to(DEVICE)
    return router.RouterCall(
        x_BD=torch.randn(B, D, generator=generator).to(DEVICE, HALF),
        weight_D=torch.randn(D, generator=generator).to(DEVICE) * 0.2,
        bias_1=torch.tensor([bias], device=DEVICE),
        threshold_1=torch.tensor([0.5], device=DEVICE),
        position_B=(torch.arange(B) * 7).to(DEVICE),  # beyond the table from row 6 on
        keep_first=4,
        forced_BP=table if forced else None,
        forced_2=torch.tensor([table.data_ptr(), P] if forced else [0, 0], device=DEVICE),
        gate_B=torch.full((B,), torch.nan, device=DEVICE),
        keep_B=torch.zeros(B, dtype=torch.bool, device=DEVICE),
        any_1=torch.zeros(1, dtype=torch.bool, device=DEVICE),
    )


@pytest.mark.parametrize("B", [1, 3, 17])
@pytest.mark.parametrize("forced", [False, True], ids=["gate", "forced"])
def test_router_equals_its_reference(B: int, forced: bool) -> None:
    got, want = (router_call(B, 100, forced) for _ in range(2))
    router.decode_router(got)
    router.reference_decode_router(want)
    torch.testing.assert_close(got.gate_B, want.gate_B, atol=1e-5, rtol=1e-5)
    assert got.keep_B.tolist() == want.keep_B.tolist()
    assert bool(got.any_1) == bool(want.any_1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("B", [1, 2, 3, 17, 32, 40])
@pytest.mark.parametrize("forced", [False, True], ids=["gate", "forced"])
def test_router_inside_a_graph_equals_its_reference(B: int, forced: bool) -> None:
    """The kernel that also sets the IF node's condition: whether the body ran is what it decided."""
    from modlab.engine.branch import HostBranch, choose_branch

    branch, note = choose_branch(DEVICE)
    assert not isinstance(branch, HostBranch), note
    for D in (100, 4096):
        for bias in (0.1, -100.0):  # the second: nobody keeps, but for the first tokens
            got, want = (router_call(B, D, forced, bias) for _ in range(2))
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
            torch.testing.assert_close(got.gate_B, want.gate_B, atol=1e-5, rtol=1e-5)
            assert got.keep_B.tolist() == want.keep_B.tolist()
            assert bool(ran) == bool(got.any_1) == bool(want.any_1)


def test_router_says_nobody_when_nobody_keeps() -> None:
    call = router_call(2, 64, forced=False, bias=-100.0)
    call.position_B += 4
    call.keep_B.fill_(True)
    call.any_1.fill_(True)
    router.decode_router(call)
    assert not call.keep_B.any() and not call.any_1


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("D", "E", "bias"), [(16, 5, True), (1024, 3, False), (1500, 4, True)])
def test_linear_equals_its_reference(D: int, E: int, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(D)
    x, weight, b = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((1, 1, D), (E, D), (E,))
    )
    bias_E = b if bias else None
    got = linear.decode_linear(x, weight, bias_E)
    want = linear.reference_decode_linear(x.double(), weight.double(), None if bias_E is None else b.double())
    assert got.shape == (1, 1, E) and got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * 8, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("S", "D"), [(1, 16), (15, 48), (16, 512), (17, 600), (50, 1024)])
def test_logits_of_a_prefill_equal_the_routers_own(S: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(S)
    own = Router(D, 0.7).to(DEVICE)
    own.weight.data = torch.randn(D, generator=generator).to(DEVICE) * D**-0.5
    wide = torch.full((1, S, D + 8), torch.nan)
    wide[..., :D] = torch.randn(1, S, D, generator=generator)
    x = wide.to(DEVICE, dtype)[..., :D]  # rows with something else between them
    with torch.no_grad():
        got, want = router_logits.kernel_router_logits(own, x), own(x)
    assert got.dtype == torch.float32 and got.shape == (1, S)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
