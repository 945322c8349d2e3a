"""A linear map of one token of one row or of a few: bound by the reading of the matrix.

Shape letters: B rows, D features in, E features out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.kernels.launch import KernelRefused, Sizes, launch, warn_slower

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK_D = 1024
"""Features read at once. On an H200, one row a program and this block read a 4096 x 14336 matrix at 4.1 TB/s,
where cuBLAS reads it at 3.6 (docs/log.md).
"""

MOST_ROWS = 16
"""Tokens that the kernel for several of them takes at most: the rows of a matrix unit's smallest tile."""


@dataclass(frozen=True)
class Tile:
    """What one program of the kernel for several rows reads at once.

    Attributes:
        outputs, inputs: features E and D.
        warps, stages: of a program.
    """

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 4

    @property
    def sizes(self) -> Sizes:
        """As the kernel is launched with it."""
        blocks = {"BLOCK_E": self.outputs, "BLOCK_D": self.inputs}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


NARROW = Tile(outputs=32, inputs=256)
"""Where a matrix has few rows. Of eight tiles this one, and `WIDE`, were the fastest on an H200; a step then
has one launch a linear map, where cuBLAS often has two (docs/log.md)."""

WIDE = Tile(outputs=64, inputs=128)

SMALL = Tile(outputs=32, inputs=64, stages=2)
"""For GPUs that have no room for these, see `launch`; in both it fits without a rest."""

FEW_OUTPUTS = 8192
"""Up to here a matrix is read by `NARROW`."""


def reference_decode_linear(x_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Plain torch: what the kernels below compute.

    Args:
        x_B1D: one token of each row.
        weight_ED, bias_E: of an `nn.Linear`, in the same dtype.

    Returns:
        [B, 1, E].
    """
    return F.linear(x_B1D, weight_ED, bias_E)


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

    @triton.jit
    def _rows_times_matrix(
        x_ptr, weight_ptr, bias_ptr, out_ptr, stride_x, stride_e, rows, D, E,
        HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
        EVEN: tl.constexpr, IEEE: tl.constexpr,
    ):  # fmt: skip
        """Some rows of the matrix, times all tokens; summed in fp32."""
        b = tl.arange(0, BLOCK_B)
        e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
        d = tl.arange(0, BLOCK_D)
        precision: tl.constexpr = "ieee" if IEEE else "tf32"
        x = x_ptr + b[:, None] * stride_x + d[None, :]
        weight = weight_ptr + e.to(tl.int64)[None, :] * stride_e + d[:, None]
        acc = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
        for first in range(0, D, BLOCK_D):
            if EVEN:
                w_DE = tl.load(weight + first, eviction_policy="evict_first")
                x_BD = tl.load(x + first, mask=(b < rows)[:, None], other=0.0)
            else:
                inside = first + d < D
                w_DE = tl.load(weight + first, mask=inside[:, None] & (e < E)[None, :], other=0.0)
                x_BD = tl.load(x + first, mask=(b < rows)[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(x_BD, w_DE, acc, input_precision=precision)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out_ptr + b[:, None] * E + e[None, :], acc.to(out_ptr.dtype.element_ty),
            mask=(b < rows)[:, None] & (e < E)[None, :],
        )  # fmt: skip


@torch.library.custom_op("modlab::decode_linear", mutates_args=())
def decode_linear(x_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """`reference_decode_linear` by a Triton kernel, for up to `MOST_ROWS` rows; tokens and rows of the weight
    must be contiguous. Where the GPU refuses the kernel, by the reference, with a warning."""
    try:
        return _by_kernel(x_B1D, weight_ED, bias_E)
    except KernelRefused as refused:
        warn_slower(str(refused), "linear maps of a decoding step run by torch")
        return reference_decode_linear(x_B1D, weight_ED, bias_E)


def _by_kernel(x_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    (E, D), rows = weight_ED.shape, x_B1D.numel() // weight_ED.shape[1]
    out = x_B1D.new_empty(*x_B1D.shape[:-1], E)
    bias = weight_ED if bias_E is None else bias_E
    if rows == 1:
        launch(
            _row_times_vector, (E,), x_B1D, weight_ED, bias, out, weight_ED.stride(0), D,
            HAS_BIAS=bias_E is not None, BLOCK=BLOCK_D, EVEN=D % BLOCK_D == 0, tiles=({"num_warps": 4},),
        )  # fmt: skip
        return out
    tile = NARROW if E <= FEW_OUTPUTS else WIDE
    x_BD = x_B1D.reshape(rows, D).to(weight_ED.dtype).contiguous()
    launch(
        _rows_times_matrix, lambda sizes: (triton.cdiv(E, sizes["BLOCK_E"]),),
        x_BD, weight_ED, bias, out, x_BD.stride(0), weight_ED.stride(0), rows, D, E,
        HAS_BIAS=bias_E is not None, BLOCK_B=MOST_ROWS, EVEN=D % tile.inputs == 0 and E % tile.outputs == 0,
        IEEE=x_BD.element_size() > 2, tiles=(tile.sizes, SMALL.sizes),
    )  # fmt: skip
    return out


@decode_linear.register_fake
def _(x_B1D, weight_ED, bias_E):  # type: ignore[no-untyped-def]
    return x_B1D.new_empty(*x_B1D.shape[:-1], weight_ED.shape[0])
