"""The one rule by which tokens are kept.

Training, prefill, decoding, calibration, previews and pictures call it; decode kernels have tested copies.

Training, prefill, decoding, calibration, previews and pictures call it; decode kernels have tested copies.

Works on tensors of torch and arrays of NumPy alike.

Shape letters: B rows, T tokens, G gates of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


BY_THRESHOLD = ("threshold", "topk")
"""Operators that decide by `kept` outside training; the decode kernels know no other rule."""


def protected(position: Any, keep_first: int) -> Any:
    """True for the first `keep_first` tokens of a text, which are kept whatever their gate.

    Args:
        position: index of each token among the real tokens of its text.
    """
    return position < keep_first


def kept(gate: Any, p: float | Any, position: Any, keep_first: int) -> Any:
    """True where a token is kept: its gate reaches the threshold, or it is among the first tokens.

    Args:
        gate: [B, T], or [B, T, G] where a layer has several gates.
        p: threshold, a number or what broadcasts with `gate`.
        position: [B, T] (or what broadcasts with the first axes of `gate`), see `protected`.
        keep_first: number of protected first tokens.

    Returns:
        bool, of the shape of `gate`.
    """
    first = protected(position, keep_first)
    return (gate >= p) | first[(..., *[None] * (gate.ndim - first.ndim))]


def top_k(logit: Tensor, real_BT: Tensor, capacity: float) -> Tensor:
    """The `capacity` share of highest logits in each row (and gate), counted over that row's real tokens.

    Args:
        logit: [B, T] or [B, T, G].

    Returns:
        bool, of the shape of `logit`.
    """
    real = real_BT[(..., *[None] * (logit.ndim - 2))]
    ranks = logit.masked_fill(~real, -float("inf")).argsort(dim=1, descending=True, stable=True)
    return ranks.argsort(dim=1) < (real.sum(1, keepdim=True) * capacity).ceil()
