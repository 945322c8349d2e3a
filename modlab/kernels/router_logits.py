"""A router's logits for many tokens at once, without an fp32 copy of the hidden states.

That copy is 0.5 GB to write and to read in each routed layer, for 32,768 tokens of width 4,096.

Shape letters: B batch rows, T tokens in, S tokens in all, D model dim, A gates of a layer, U units of a
hidden layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modlab.kernels.device import multiprocessors_of
from modlab.kernels.launch import KernelRefused, Sizes, launch, warn_slower
from modlab.routing.router import HiddenRouter, Router

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK_S = 16
"""Tokens of one program; each is read once, so this only has to keep the memory busy."""


@dataclass(frozen=True)
class Tile:
    """What one program of a router with several gates or a hidden layer, whose weights every program reads,
    takes at once.

    Attributes:
        tokens, inputs: of S and D.
        warps, stages: of a program.
        shares: programs that share out the inputs of a token; of more than one, a second kernel sums what
            they found.
    """

    tokens: int
    inputs: int = 64
    warps: int = 4
    stages: int = 3
    shares: int = 1

    @property
    def sizes(self) -> Sizes:
        """As the kernel is launched with it."""
        blocks = {"BLOCK_S": self.tokens, "BLOCK_D": self.inputs, "SHARES": self.shares}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


LONG = Tile(64)
"""In lines long enough for every multiprocessor to have a program: of 32,768 tokens of width 4,096 an H200
takes 276 us, and 386 in the tiles below."""

SHORT = Tile(64, 128, shares=4)
"""In others: of 4,096 tokens 44 us, 73 in tiles of 32 whose programs take all inputs, and 103 in those above
(docs/log.md)."""

SMALL = Tile(16, 32, stages=1)
"""For GPUs that have no room for these, see `launch`."""

MOST_COLUMNS = 32
"""Gates and hidden units, padded to blocks, up to which a tile takes more than 64 inputs: their weights lie
in shared memory, of which some GPUs have 64 KB a program."""

WIDEST = 128
"""The same, up to which the kernel is used: two blocks of 64 take 48 KB on sm_75 (of 64), 72 on sm_86 (of 99)
and 96 on sm_90 (of 227), by Triton 3.9's builds. 256 hidden units would take 286 on sm_90."""


def router_logits(router: Router, x_BTD: Tensor) -> Tensor:
    """Router logits, fp32 [B, T] or [B, T, A]: by a kernel on a GPU, else by the router's own forward, the
    reference; so also with more gates and hidden units than every GPU has shared memory for, and, with a
    warning, where the GPU refuses the kernel."""
    half = x_BTD.dtype in (torch.bfloat16, torch.float16)
    if not x_BTD.is_cuda or not half or x_BTD.stride(-1) != 1 or sum(blocks_of(router)) > WIDEST:
        return router(x_BTD)
    try:
        return kernel_router_logits(router, x_BTD)
    except KernelRefused as refused:
        warn_slower(str(refused), "routers of prompts run by torch")
        return router(x_BTD)


def kernel_router_logits(router: Router, x_BTD: Tensor, tile: Tile | None = None) -> Tensor:
    """`router.forward` by one Triton kernel; the innermost dimension of x must be contiguous.

    Args:
        tile: of a router with several gates or a hidden layer, if not the usual one.
    """
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    S, D = x_SD.shape
    A, hidden = len(router.bias), isinstance(router, HiddenRouter)
    shape = (*x_BTD.shape[:-1], *router.weight.shape[:-1])
    out = torch.empty(shape, dtype=torch.float32, device=x_SD.device)
    if A == 1 and not hidden:
        launch(
            _logits, (triton.cdiv(S, BLOCK_S),), x_SD, router.weight, router.bias, out, x_SD.stride(0), S,
            D=D, BLOCK_S=BLOCK_S, BLOCK_D=min(triton.next_power_of_2(D), 512), tiles=({"num_warps": 4},),
        )  # fmt: skip
        return out
    into, back = (router.into, router.out) if isinstance(router, HiddenRouter) else (router.weight,) * 2
    K = len(into) if hidden else 0
    BLOCK_A, BLOCK_K = blocks_of(router)
    tile = tile or usual_tile(S, BLOCK_A + BLOCK_K, multiprocessors_of(x_SD.device))
    shapes = {"A": A, "K": K, "D": D, "BLOCK_A": BLOCK_A, "BLOCK_K": BLOCK_K}
    small = replace(SMALL, shares=tile.shares)
    sums = out
    if tile.shares > 1:
        sums = torch.empty(tile.shares, S, BLOCK_A + BLOCK_K + 1, dtype=torch.float32, device=x_SD.device)
    launch(
        _wide_logits, lambda sizes: (triton.cdiv(S, sizes["BLOCK_S"]), sizes["SHARES"]),
        x_SD, router.weight, router.bias, into, back, sums, x_SD.stride(0), S,
        **shapes, tiles=(tile.sizes, small.sizes),
    )  # fmt: skip
    if tile.shares > 1:
        launch(
            _sum_shares, (triton.cdiv(S, BLOCK_S),), sums, router.bias, back, out, S, **shapes,
            BLOCK_S=BLOCK_S, SHARES=tile.shares, tiles=({"num_warps": 1},),
        )  # fmt: skip
    return out


def blocks_of(router: Router) -> tuple[int, int]:
    """Gates and hidden units, each padded to a block: a power of two, 16 at least."""
    hidden = len(router.into) if isinstance(router, HiddenRouter) else 0
    gates, units = (triton.next_power_of_2(n) for n in (len(router.bias), hidden))
    return max(16, gates), max(16, units)


def usual_tile(tokens: int, columns: int, multiprocessors: int) -> Tile:
    """What is fastest of the tiles that were timed, and fits.

    Args:
        columns: gates and hidden units, padded to blocks.
    """
    tile = LONG if LONG.tokens * multiprocessors <= tokens else SHORT
    return tile if columns <= MOST_COLUMNS else replace(tile, inputs=min(tile.inputs, 64))


if triton is not None:

    @triton.jit
    def _logits(
        x_ptr, weight_ptr, bias_ptr, out_ptr, stride_x, rows,
        D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """w·x + b of some tokens, summed in fp32."""
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < rows
        x = x_ptr + row.to(tl.int64)[:, None] * stride_x
        logit = tl.zeros([BLOCK_S], tl.float32)
        for at in range(0, D, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            values = tl.load(x + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
            logit += tl.sum(values.to(tl.float32) * weight[None, :], 1)
        tl.store(out_ptr + row, logit + tl.load(bias_ptr), mask=inside)

    @triton.jit
    def _plus_product(total, x, weight):
        """total + x·weight, as exact as with both in fp32: a state of half precision is exact in tf32, so two
        parts of a weight are enough, the first with the bits that tf32 has."""
        if x.dtype == tl.float32:
            total = tl.dot(x, weight, total, input_precision="tf32x3")
        else:
            wide = x.to(tl.float32)
            high = (weight.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            total = tl.dot(wide, weight - high, total, input_precision="tf32")
            total = tl.dot(wide, high, total, input_precision="tf32")
        return total

    @triton.jit
    def _store_gates(
        logit, hidden, squares, bias_ptr, back_ptr, out_ptr, row, inside,
        A: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """The gates of some tokens, of sums over all inputs: [S, A], [S, K] and [S]."""
        a, k = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_K)
        if K:
            norm = tl.rsqrt(squares / D + 1e-6)[:, None]
            hidden = hidden * norm
            hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
            back = tl.load(
                back_ptr + a[None, :] * K + k[:, None], mask=(a < A)[None, :] & (k < K)[:, None], other=0.0
            )
            logit = logit * norm + tl.dot(hidden, back, input_precision="tf32x3")
        logit += tl.load(bias_ptr + a, mask=a < A, other=0.0)[None, :]
        at_out = row.to(tl.int64)[:, None] * A + a[None, :]
        tl.store(out_ptr + at_out, logit, mask=inside[:, None] & (a < A)[None, :])

    @triton.jit
    def _wide_logits(
        x_ptr, weight_ptr, bias_ptr, into_ptr, back_ptr, out_ptr, stride_x, rows,
        A: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SHARES: tl.constexpr,
    ):  # fmt: skip
        """The gates of some tokens, or, of a share of the inputs, sums [SHARES, S, A + K + 1] in blocks."""
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < rows
        a, k = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_K)
        x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_x
        logit = tl.zeros([BLOCK_S, BLOCK_A], tl.float32)
        hidden = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_S], tl.float32)
        blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
        own: tl.constexpr = (blocks + SHARES - 1) // SHARES
        share = tl.program_id(1)
        for block in range(share * own, tl.minimum((share + 1) * own, blocks)):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            x = tl.load(x_rows + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            weight = tl.load(
                weight_ptr + a[None, :] * D + d[:, None], mask=(a < A)[None, :] & (d < D)[:, None], other=0.0
            )
            logit = _plus_product(logit, x, weight)
            if K:
                into = tl.load(
                    into_ptr + k[None, :] * D + d[:, None],
                    mask=(k < K)[None, :] & (d < D)[:, None], other=0.0,
                )  # fmt: skip
                hidden = _plus_product(hidden, x, into)
                squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        if SHARES == 1:
            _store_gates(
                logit, hidden, squares, bias_ptr, back_ptr, out_ptr, row, inside, A, K, D, BLOCK_A, BLOCK_K
            )
        else:
            sums = out_ptr + (share * rows + row.to(tl.int64)) * (BLOCK_A + BLOCK_K + 1)
            tl.store(sums[:, None] + a[None, :], logit, mask=inside[:, None])
            tl.store(sums[:, None] + BLOCK_A + k[None, :], hidden, mask=inside[:, None])
            tl.store(sums + BLOCK_A + BLOCK_K, squares, mask=inside)

    @triton.jit
    def _sum_shares(
        sums_ptr, bias_ptr, back_ptr, out_ptr, rows,
        A: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_S: tl.constexpr, SHARES: tl.constexpr,
    ):  # fmt: skip
        """The gates of some tokens, of what each share of the inputs has come to."""
        row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = row < rows
        a, k = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_K)
        logit = tl.zeros([BLOCK_S, BLOCK_A], tl.float32)
        hidden = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_S], tl.float32)
        for share in tl.static_range(SHARES):
            sums = sums_ptr + (share * rows + row.to(tl.int64)) * (BLOCK_A + BLOCK_K + 1)
            logit += tl.load(sums[:, None] + a[None, :], mask=inside[:, None], other=0.0)
            hidden += tl.load(sums[:, None] + BLOCK_A + k[None, :], mask=inside[:, None], other=0.0)
            squares += tl.load(sums + BLOCK_A + BLOCK_K, mask=inside, other=0.0)
        _store_gates(
            logit, hidden, squares, bias_ptr, back_ptr, out_ptr, row, inside, A, K, D, BLOCK_A, BLOCK_K
        )
