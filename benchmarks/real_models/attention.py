"""Attention where keys older than a window carry a log-weight: plain reference, and one choice for a device.

q [B, T, N, H]; k, v [B, T, G, H]; log_weight [B, G, T], at most 0, with gradient; result as q. A key is
older than the window for a query that stands at least `window` tokens behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, window: int) -> Tensor:
    """Whole score matrices in fp32: the specification, and what runs without a GPU."""
    T, heads = q.shape[1], q.shape[2] // k.shape[2]
    age = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    more = torch.where(age >= window, log_weight.float()[:, :, None, :], 0.0)
    more = more.masked_fill(age < 0, -torch.inf).repeat_interleave(heads, 1)
    k_BNTH, v_BNTH = (x.float().repeat_interleave(heads, 2).transpose(1, 2) for x in (k, v))
    scores = q.float().transpose(1, 2) @ k_BNTH.transpose(-1, -2) * q.shape[-1] ** -0.5 + more
    return (scores.softmax(-1) @ v_BNTH).transpose(1, 2).to(q.dtype).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, window: int) -> Tensor:
    """The kernel on a GPU, the reference elsewhere."""
    if q.device.type != "cuda":
        return reference(q, k, v, log_weight, window)
    from benchmarks.real_models.kernel import WeighedAttention

    return WeighedAttention.apply(q, k, v, log_weight, window)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention to everything."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
