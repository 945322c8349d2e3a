"""The one rule by which tokens are kept.

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


def over(value: Any, like: Any) -> Any:
    """`value`, which has the first axes of `like`, with as many axes more as it takes to combine the two: one
    value a token [B, T] for gates [B, T, G] or states [B, T, D]."""
    return value[(..., *[None] * (like.ndim - value.ndim))]


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
    return (gate >= p) | over(protected(position, keep_first), gate)


def top_k(logit: Tensor, real_BT: Tensor, capacity: float) -> Tensor:
    """The `capacity` share of highest logits in each row (and gate), counted over that row's real tokens.

    Args:
        logit: [B, T] or [B, T, G].

    Returns:
        bool, of the shape of `logit`.
    """
    real = over(real_BT, logit)
    ranks = logit.masked_fill(~real, -float("inf")).argsort(dim=1, descending=True, stable=True)
    return ranks.argsort(dim=1) < (real.sum(1, keepdim=True) * capacity).ceil()
