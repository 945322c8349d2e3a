"""A linear map of one token: a matrix-vector product, bound by the reading of the matrix.

Shape letters: D features in, E features out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK_D = 1024
"""Features read at once. On an H200, one row a program and this block read a 4096 x 14336 matrix at 4.1 TB/s,
where cuBLAS reads it at 3.6 (docs/log.md).
"""


def reference_decode_linear(x_11D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Plain torch: what the kernel below computes.

    Args:
        x_11D: one token of one row; leading dimensions of 1.
        weight_ED, bias_E: of an `nn.Linear`, in the same dtype.

    Returns:
        [1, 1, E].
    """
    return F.linear(x_11D, weight_ED, bias_E)


if triton is not None:

    @triton.jit
    def _row_times_vector(
        x_ptr, weight_ptr, bias_ptr, out_ptr, stride_e, D,
        HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """One row of the matrix, summed in fp32."""
        row = tl.program_id(0)
        weight = weight_ptr + row.to(tl.int64) * stride_e
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            if EVEN:
                w = tl.load(weight + d, eviction_policy="evict_first")
                x = tl.load(x_ptr + d)
            else:
                w = tl.load(weight + d, mask=d < D, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptr + d, mask=d < D, other=0.0)
            total += w.to(tl.float32) * x.to(tl.float32)
        out = tl.sum(total, 0)
        if HAS_BIAS:
            out += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))


@torch.library.custom_op("modlab::decode_linear", mutates_args=())
def decode_linear(x_11D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """`reference_decode_linear` by a Triton kernel; x and each row of the weight must be contiguous."""
    E, D = weight_ED.shape
    out = x_11D.new_empty(*x_11D.shape[:-1], E)
    _row_times_vector[(E,)](
        x_11D, weight_ED, weight_ED if bias_E is None else bias_E, out, weight_ED.stride(0), D,
        HAS_BIAS=bias_E is not None, BLOCK=BLOCK_D, EVEN=D % BLOCK_D == 0, num_warps=4,
    )  # fmt: skip
    return out


@decode_linear.register_fake
def _(x_11D, weight_ED, bias_E):  # type: ignore[no-untyped-def]
    return x_11D.new_empty(*x_11D.shape[:-1], weight_ED.shape[0])
