"""Attention of the study: the package's kernel for keys with log-weights, and dense attention.

q [B, T, N, H]; k, v [B, T, G, H]; log_weight [B, G, T], at most 0, with gradient; result as q. A key is
older than the window for a query that stands at least `window` tokens behind it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from modlab.kernels.weighed_attention import weighed_attention


def attend(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, window: int) -> Tensor:
    """The kernel on a GPU, the reference elsewhere."""
    return weighed_attention(q, k, v, log_weight, window)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention to everything."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
