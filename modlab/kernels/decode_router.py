"""The routing decision of one decoding step: gates, who keeps, and whether any row keeps.

A linear router with one gate takes one kernel of one program. One with several gates or a hidden layer has 20
times the weights, which one multiprocessor would take 5 us to read (16 hidden units and 8 gates on a model of
width 4,096): a program a unit and gate reads them, a second kernel decides.

Shape letters: B rows, D model dim, A gates of a layer, U units of a hidden layer, P positions of a routing
table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.kernels.launch import Sizes, launch
from modlab.routing.router import normalised

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None


TILES: tuple[Sizes, ...] = ({"num_warps": 8},)


@dataclass
class RouterCall:
    """One layer's routing decision in one step: what goes in, and where the result goes.

    Attributes:
        x_BD: hidden states of the one new token of each row.
        weight: the router's, fp32 [D], or [A, D] where there are several gates.
        bias_A: fp32.
        threshold_1: p of this layer, fp32.
        position_B: index of the token among the real tokens of its row, long.
        keep_first: tokens before this position are kept whatever their gate.
        forced: a routing table that decides instead of the gates, bool [B, P], or [B, P, A] where it says
            something else of each gate; None without one. Its last position serves all later ones.
        forced_3: the same for kernels: its address, P, and how many answers it has for a position, int64;
            address 0 lets the gates decide.
        gate, keep, any_1: written; fp32 and bool, [B] or [B, A]; bool.
        into_UD, out_AU: of a hidden layer (`HiddenRouter`), fp32; None without one.
    """

    x_BD: Tensor
    weight: Tensor
    bias_A: Tensor
    threshold_1: Tensor
    position_B: Tensor
    keep_first: int
    forced: Tensor | None
    forced_3: Tensor
    gate: Tensor
    keep: Tensor
    any_1: Tensor
    into_UD: Tensor | None = None
    out_AU: Tensor | None = None

    @property
    def is_wide(self) -> bool:
        """Whether there is more than one gate by one linear map."""
        return self.weight.dim() > 1 or self.into_UD is not None


def reference_decode_router(call: RouterCall) -> None:
    """Plain torch: what the kernels compute (this file's, and the one of decode_router.cu)."""
    x_BD = call.x_BD.float() if call.into_UD is None else normalised(call.x_BD)
    logit_BA = F.linear(x_BD, call.weight.view(-1, x_BD.shape[1]), call.bias_A)
    if call.into_UD is not None and call.out_AU is not None:
        logit_BA = logit_BA + F.linear(F.gelu(F.linear(x_BD, call.into_UD)), call.out_AU)
    gate_BA = torch.sigmoid(logit_BA)
    if call.forced is not None:
        table_BPA = call.forced.view(*call.forced.shape[:2], -1)
        at_B = call.position_B.clamp_max(table_BPA.shape[1] - 1)
        keep_BA = table_BPA[torch.arange(len(at_B), device=at_B.device), at_B].expand_as(gate_BA)
    else:
        keep_BA = (gate_BA >= call.threshold_1) | (call.position_B < call.keep_first)[:, None]
    call.gate.copy_(gate_BA.view_as(call.gate))
    call.keep.copy_(keep_BA.reshape(call.keep.shape))
    call.any_1.copy_(keep_BA.any())


if triton is not None:

    @triton.jit
    def _route(
        x_ptr, weight_ptr, bias_ptr, threshold_ptr, position_ptr, forced_ptr, gate_ptr, keep_ptr, any_ptr,
        stride_x, rows, keep_first,
        D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program for the layer: B is small, and one program needs no second kernel for `any`."""
        anyone = 0
        for first in range(0, rows, BLOCK_B):
            row = first + tl.arange(0, BLOCK_B)
            inside = row < rows
            logit = tl.zeros([BLOCK_B], tl.float32)
            for at in range(0, D, BLOCK_D):
                d = at + tl.arange(0, BLOCK_D)
                x = tl.load(
                    x_ptr + row[:, None] * stride_x + d[None, :],
                    mask=inside[:, None] & (d < D)[None, :], other=0.0,
                )  # fmt: skip
                weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
                logit += tl.sum(x.to(tl.float32) * weight[None, :], 1)
            gate = 1.0 / (1.0 + tl.exp(-(logit + tl.load(bias_ptr))))
            position = tl.load(position_ptr + row, mask=inside, other=0)
            forced = tl.load(forced_ptr)  # address of a routing table, or 0
            if forced != 0:
                span = tl.load(forced_ptr + 1)
                table = forced.to(tl.pointer_type(tl.int8))
                slot = row * span + tl.minimum(position, span - 1)
                keep = tl.load(table + slot, mask=inside, other=0) != 0
            else:
                keep = (gate >= tl.load(threshold_ptr)) | (position < keep_first)
            keep = keep & inside
            tl.store(gate_ptr + row, gate, mask=inside)
            tl.store(keep_ptr + row, keep.to(tl.int8), mask=inside)
            anyone = tl.maximum(anyone, tl.max(keep.to(tl.int32), 0))
        tl.store(any_ptr, (anyone > 0).to(tl.int8))

    @triton.jit
    def _project(
        x_ptr, weight_ptr, into_ptr, out_ptr, stride_x, rows,
        A: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, NORMALISED: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One gate's linear map, or one hidden unit's, of some rows."""
        unit = tl.program_id(0)
        weights = weight_ptr + unit * D
        if unit >= A:
            weights = into_ptr + (unit - A) * D
        row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
        inside = row < rows
        total = tl.zeros([BLOCK_B], tl.float32)
        squares = tl.zeros([BLOCK_B], tl.float32)
        for at in range(0, D, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + row[:, None] * stride_x + d[None, :],
                mask=inside[:, None] & (d < D)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            weight = tl.load(weights + d, mask=d < D, other=0.0)
            total += tl.sum(x * weight[None, :], 1)
            squares += tl.sum(x * x, 1)
        if NORMALISED:
            total = total * tl.rsqrt(squares / D + 1e-6)
        tl.store(out_ptr + row * UNITS + unit, total, mask=inside)

    @triton.jit
    def _decide(
        in_ptr, bias_ptr, out_ptr, threshold_ptr, position_ptr, forced_ptr, gate_ptr, keep_ptr, any_ptr,
        rows, keep_first,
        A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_B: tl.constexpr,
    ):  # fmt: skip
        """All gates of all rows from what `_project` has left; one program, as of `_route`."""
        a, k = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_K)
        anyone = 0
        for first in range(0, rows, BLOCK_B):
            row = first + tl.arange(0, BLOCK_B)
            inside = (row < rows)[:, None] & (a < A)[None, :]
            logit = tl.load(in_ptr + row[:, None] * (A + K) + a[None, :], mask=inside, other=0.0)
            logit += tl.load(bias_ptr + a, mask=a < A, other=0.0)[None, :]
            if K:
                hidden = tl.load(
                    in_ptr + row[:, None] * (A + K) + A + k[None, :],
                    mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0,
                )  # fmt: skip
                hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
                out = tl.load(
                    out_ptr + a[:, None] * K + k[None, :], mask=(a < A)[:, None] & (k < K)[None, :], other=0.0
                )
                logit += tl.sum(hidden[:, None, :] * out[None, :, :], 2)
            gate = 1.0 / (1.0 + tl.exp(-logit))
            position = tl.load(position_ptr + row, mask=row < rows, other=0)
            forced = tl.load(forced_ptr)  # address of a routing table, or 0
            if forced != 0:
                span, answers = tl.load(forced_ptr + 1), tl.load(forced_ptr + 2)
                table = forced.to(tl.pointer_type(tl.int8))
                place = (row * span + tl.minimum(position, span - 1)) * answers
                slot = place[:, None] + tl.minimum(a, answers - 1)[None, :]
                keep = tl.load(table + slot, mask=inside, other=0) != 0
            else:
                keep = (gate >= tl.load(threshold_ptr)) | (position < keep_first)[:, None]
            keep = keep & inside
            tl.store(gate_ptr + row[:, None] * A + a[None, :], gate, mask=inside)
            tl.store(keep_ptr + row[:, None] * A + a[None, :], keep.to(tl.int8), mask=inside)
            anyone = tl.maximum(anyone, tl.max(tl.max(keep.to(tl.int32), 1), 0))
        tl.store(any_ptr, (anyone > 0).to(tl.int8))


def decode_router(call: RouterCall) -> None:
    """`reference_decode_router` by one Triton kernel, or two where the router is wide."""
    B, D = call.x_BD.shape
    block_b = min(16, triton.next_power_of_2(B))
    block_d = min(triton.next_power_of_2(D), 8192 // block_b)
    decision = (
        call.threshold_1, call.position_B, call.forced_3, call.gate, call.keep.view(torch.int8),
        call.any_1.view(torch.int8),
    )  # fmt: skip
    if not call.is_wide:
        launch(
            _route, (1,), call.x_BD, call.weight, call.bias_A, *decision, call.x_BD.stride(0), B,
            call.keep_first, D=D, BLOCK_B=block_b, BLOCK_D=block_d, tiles=TILES,
        )  # fmt: skip
        return
    A, K = len(call.bias_A), 0 if call.into_UD is None else len(call.into_UD)
    projected = torch.empty(B, A + K, dtype=torch.float32, device=call.x_BD.device)
    into_UD, out_AU = (call.weight if t is None else t for t in (call.into_UD, call.out_AU))
    launch(
        _project, (A + K, triton.cdiv(B, block_b)),
        call.x_BD, call.weight, into_UD, projected, call.x_BD.stride(0), B,
        A=A, UNITS=A + K, D=D, NORMALISED=K > 0, BLOCK_B=block_b, BLOCK_D=block_d, tiles=TILES,
    )  # fmt: skip
    launch(
        _decide, (1,), projected, call.bias_A, out_AU, *decision, B, call.keep_first,
        A=A, K=K, BLOCK_A=triton.next_power_of_2(A), BLOCK_K=triton.next_power_of_2(max(K, 1)),
        BLOCK_B=block_b, tiles=TILES,
    )  # fmt: skip
