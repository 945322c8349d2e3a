"""What gates must beat at equal bytes: chance, chance in the gates' own shares, whole heads, whole layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.real_models.decoder import KeepRule
from benchmarks.real_models.evaluate import older_share


def controls(
    keep_by_gate: list[list[float]], ratio: float, T: int, window: int, first: int
) -> Iterator[tuple[str, int, KeepRule]]:
    """(name, window, rule) of every control.

    Args:
        keep_by_gate: what distilled gates keep, [L][A]; only the order and proportions count.
    """
    share = torch.tensor(keep_by_gate)
    each = older_share(ratio, T, window, first)
    yield "chance", window, chance(torch.full_like(share, each))
    layers = share.mean(1, keepdim=True).expand_as(share)
    yield "chance per layer", window, chance(scaled(layers, each))
    if share.shape[1] > 1:
        yield "chance per head", window, chance(scaled(share, each))
        yield "whole heads", window, whole(largest(share, each))
    yield "whole layers", window, whole(largest(layers[:, :1], each).expand_as(share))
    yield "window alone", int(T / ratio) - first, whole(torch.zeros_like(share, dtype=torch.bool))


def scaled(share_LA: Tensor, mean: float) -> Tensor:
    """Proportional to `share_LA`, at most 1, with the mean asked for."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        if (share_LA * middle).clamp(max=1).mean() > mean:
            high = middle
        else:
            low = middle
    return (share_LA * low).clamp(max=1)


def largest(share_LA: Tensor, mean: float) -> Tensor:
    """Which entries are kept whole when `mean` of all may be; bool."""
    count = round(mean * share_LA.numel())
    order = share_LA.flatten().argsort(descending=True)[:count]
    kept = torch.zeros(share_LA.numel(), dtype=torch.bool)
    kept[order] = True
    return kept.view_as(share_LA)


def chance(share_LA: Tensor) -> KeepRule:
    """Each key of a gate is kept with the gate's share as probability."""

    def keep(layer: int, z_BAT: Tensor) -> Tensor:
        return torch.rand_like(z_BAT) < share_LA[layer].to(z_BAT.device)[None, :, None]

    return keep


def whole(kept_LA: Tensor) -> KeepRule:
    """All keys of the gates that are named, none of the others."""

    def keep(layer: int, z_BAT: Tensor) -> Tensor:
        return kept_LA[layer].to(z_BAT.device)[None, :, None].expand_as(z_BAT)

    return keep
