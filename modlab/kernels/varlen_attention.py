"""Causal attention over rows of different lengths laid out in one line, without padding.

Shape letters: S tokens of all rows, N query heads, G kv heads, H head dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 8192
"""From this length on torch's sdpa (cuDNN on Hopper) is worth its plan, which it makes once a shape."""

BUCKET = 1024
"""Lengths that vary from layer to layer are padded to multiples of this, so that few plans serve all."""


def reference_varlen_attention(
    q_1NSH: Tensor, k_1GSH: Tensor, v_1GSH: Tensor, counts: list[int], scale: float | None
) -> Tensor:
    """Plain torch: row by row.

    Args:
        q_1NSH, k_1GSH, v_1GSH: the rows one after another.
        counts: tokens of each row; their sum is S.
        scale: factor on the scores, or None for 1 / sqrt(H).

    Returns:
        [1, S, N, H].
    """
    out, first = [], 0
    for n in counts:
        if n:
            span = slice(first, first + n)
            out.append(_one_row(q_1NSH[:, :, span], k_1GSH[:, :, span], v_1GSH[:, :, span], scale))
        first += n
    return torch.cat(out, dim=2).transpose(1, 2)


def varlen_attention(
    q_1NSH: Tensor,
    k_1GSH: Tensor,
    v_1GSH: Tensor,
    counts: list[int],
    bounds: Tensor,
    scale: float | None,
    varying: bool = False,
) -> Tensor:
    """`reference_varlen_attention`, by flash attention's variable-length kernel or, for long rows, by sdpa.

    On an H200 sdpa chooses cuDNN: 650 against 345 TFLOP/s at 32k (docs/log.md).

    Args:
        bounds: where each row begins, and the end of the last, int32 [B + 1]: `counts`, where a kernel reads
            them without the host sending them along.
        varying: True if the lengths change from layer to layer: long rows are then padded to `BUCKET`.
    """
    half = q_1NSH.dtype in (torch.bfloat16, torch.float16)
    if not q_1NSH.is_cuda or not half or q_1NSH.shape[-1] != v_1GSH.shape[-1]:
        return reference_varlen_attention(q_1NSH, k_1GSH, v_1GSH, counts, scale)
    return fast_rows(q_1NSH, k_1GSH, v_1GSH, counts, bounds, scale, varying)


def fast_rows(
    q_1NSH: Tensor,
    k_1GSH: Tensor,
    v_1GSH: Tensor,
    counts: list[int],
    bounds: Tensor,
    scale: float | None,
    varying: bool,
    long_row: Callable[..., Tensor] | None = None,
    short_rows: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The kernel of each row, as its length says; arguments and result as `varlen_attention`'s.

    Args:
        long_row, short_rows: the two kernels, if not the usual ones.
    """
    long_row, short_rows = long_row or _one_row, short_rows or _flash
    alone = len(counts) == 1 and not varying
    if not alone and max(counts) < LONG:
        return short_rows(q_1NSH, k_1GSH, v_1GSH, max(counts), bounds, scale)
    out, first = [], 0
    for row, n in enumerate(counts):
        if n:
            q, k, v = (t[:, :, first : first + n] for t in (q_1NSH, k_1GSH, v_1GSH))
            if varying and n >= LONG and n % BUCKET:  # a padding of nothing would copy all three
                # Slots after the row's own are later than all of them, so causality hides them.
                q, k, v = (F.pad(t, (0, 0, 0, -n % BUCKET)) for t in (q, k, v))
            if alone or n >= LONG:
                out.append(long_row(q, k, v, scale)[:, :, :n].transpose(1, 2))
            else:
                out.append(short_rows(q, k, v, n, bounds[row : row + 2] - bounds[row], scale))
        first += n
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _one_row(q_1NSH: Tensor, k_1GSH: Tensor, v_1GSH: Tensor, scale: float | None) -> Tensor:
    gqa = q_1NSH.shape[1] != k_1GSH.shape[1]
    return F.scaled_dot_product_attention(q_1NSH, k_1GSH, v_1GSH, is_causal=True, scale=scale, enable_gqa=gqa)


def _flash(
    q_1NSH: Tensor, k_1GSH: Tensor, v_1GSH: Tensor, longest: int, bounds: Tensor, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q_SNH, k_SGH, v_SGH = (t[0].transpose(0, 1) for t in (q_1NSH, k_1GSH, v_1GSH))
    out_SNH: Any = varlen_attn(
        q_SNH, k_SGH, v_SGH, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **_gqa()
    )
    return out_SNH[None]


@functools.cache
def _gqa() -> dict[str, Any]:
    """torch 2.11 takes fewer kv heads without being told, later versions want to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
