"""A router's logits for many tokens at once, without an fp32 copy of the hidden states.

That copy is 0.5 GB to write and to read in each routed layer, for 32,768 tokens of width 4,096.

Shape letters: B batch rows, T tokens in, S tokens in all, D model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modlab.routing.router import Router

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK_S = 16
"""Tokens of one program; each is read once, so this only has to keep the memory busy."""


def router_logits(router: Router, x_BTD: Tensor) -> Tensor:
    """Router logits, fp32 [B, T]: by the kernel on a GPU, else by the router's own forward, the reference."""
    half = x_BTD.dtype in (torch.bfloat16, torch.float16)
    if not x_BTD.is_cuda or not half or x_BTD.stride(-1) != 1:
        return router(x_BTD)
    return kernel_router_logits(router, x_BTD)


def kernel_router_logits(router: Router, x_BTD: Tensor) -> Tensor:
    """`Router.forward` by one Triton kernel; the innermost dimension of x must be contiguous."""
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    S, D = x_SD.shape
    out_S = torch.empty(S, dtype=torch.float32, device=x_SD.device)
    _logits[(triton.cdiv(S, BLOCK_S),)](
        x_SD, router.weight, router.bias, out_S, x_SD.stride(0), S,
        D=D, BLOCK_S=BLOCK_S, BLOCK_D=min(triton.next_power_of_2(D), 512), num_warps=4,
    )  # fmt: skip
    return out_S.view(x_BTD.shape[:-1])


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
