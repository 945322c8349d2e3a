"""The routing decision of one decoding step: gate, keep, and whether any row keeps.

Shape letters: B rows, D model dim, P positions of a routing table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None


@dataclass
class RouterCall:
    """One layer's routing decision in one step: what goes in, and where the result goes.

    Attributes:
        x_BD: hidden states of the one new token of each row.
        weight_D, bias_1: the router's, fp32.
        threshold_1: p of this layer, fp32.
        position_B: index of the token among the real tokens of its row, long.
        keep_first: tokens before this position are kept whatever their gate.
        forced_BP: a routing table that decides instead of the gate, bool, or None; its last position serves
            all later ones.
        forced_2: the same for kernels: its address and P, int64; address 0 lets the gate decide.
        gate_B, keep_B, any_1: written; fp32, bool, bool.
    """

    x_BD: Tensor
    weight_D: Tensor
    bias_1: Tensor
    threshold_1: Tensor
    position_B: Tensor
    keep_first: int
    forced_BP: Tensor | None
    forced_2: Tensor
    gate_B: Tensor
    keep_B: Tensor
    any_1: Tensor


def reference_decode_router(call: RouterCall) -> None:
    """Plain torch: what the kernels compute (this file's, and the one of decode_router.cu)."""
    logit_B = call.x_BD.float() @ call.weight_D + call.bias_1
    gate_B = torch.sigmoid(logit_B)
    if call.forced_BP is not None:
        last = call.forced_BP.shape[1] - 1
        keep_B = call.forced_BP.gather(1, call.position_B[:, None].clamp_max(last))[:, 0]
    else:
        keep_B = (gate_B >= call.threshold_1) | (call.position_B < call.keep_first)
    call.gate_B.copy_(gate_B)
    call.keep_B.copy_(keep_B)
    call.any_1.copy_(keep_B.any())


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


def decode_router(call: RouterCall) -> None:
    """`reference_decode_router` by one Triton kernel."""
    B, D = call.x_BD.shape
    block_b = min(16, triton.next_power_of_2(B))
    _route[(1,)](
        call.x_BD, call.weight_D, call.bias_1, call.threshold_1, call.position_B, call.forced_2,
        call.gate_B, call.keep_B.view(torch.int8), call.any_1.view(torch.int8),
        call.x_BD.stride(0), B, call.keep_first,
        D=D, BLOCK_B=block_b, BLOCK_D=min(triton.next_power_of_2(D), 8192 // block_b), num_warps=8,
    )  # fmt: skip
