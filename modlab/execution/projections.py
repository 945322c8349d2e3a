"""Trained projections of a layer's queries, keys and values, next to the base's own, which stay as they are.

They live in the layer under `mod_projections`, so that they are trained, saved and removed with what
conversion adds. Either each is a whole copy of the base's, or a low-rank addition to it.

Shape letters: B rows, T tokens in. Other letters: I features in, O features out, R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = "mod_projections"
"""Name of the trained projections inside a layer."""

OWN = ("q_proj", "k_proj", "v_proj")
"""Names of the projections inside an attention module."""


class WholeProjection(nn.Module):
    """A copy of a linear map, trained by itself.

    Args:
        base: the map; it is copied.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().clone())
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone())

    def forward(self, x_BTI: Tensor, base: nn.Module) -> Tensor:
        """[B, T, O]; `base` is not asked."""
        bias = None if self.bias is None else self.bias.to(x_BTI.dtype)
        return F.linear(x_BTI, self.weight.to(x_BTI.dtype), bias)


class LowRankProjection(nn.Module):
    """A low-rank addition to a linear map (LoRA, arXiv 2106.09685); zero right after conversion.

    Args:
        base: the map; it stays where it is.
        features_in, features_out: I and O.
        rank: R.
        seed: of the random half.
    """

    def __init__(self, base: nn.Module, features_in: int, features_out: int, rank: int, seed: int) -> None:
        super().__init__()
        weight = next(base.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        generator = torch.Generator().manual_seed(seed)
        down_RI = torch.randn(rank, features_in, generator=generator) / math.sqrt(features_in)
        self.down = nn.Parameter(down_RI.to(weight.device, dtype))
        self.up = nn.Parameter(torch.zeros(features_out, rank, device=weight.device, dtype=dtype))

    def forward(self, x_BTI: Tensor, base: nn.Module) -> Tensor:
        """[B, T, O]: what `base` says, and the addition."""
        added = F.linear(F.linear(x_BTI, self.down.to(x_BTI.dtype)), self.up.to(x_BTI.dtype))
        out: Tensor = base(x_BTI)
        return out + added.to(out.dtype)


class Projections(nn.Module):
    """The three of one layer, under the names that they have in its attention module.

    Args:
        attention: the layer's attention module.
        rank: of low-rank additions; 0 for whole copies.
        seed: of their random halves.
    """

    def __init__(self, attention: nn.Module, rank: int, seed: int = 0) -> None:
        super().__init__()
        for place, name in enumerate(OWN):
            base: nn.Linear = attention.get_submodule(name)  # type: ignore[assignment]
            if rank:
                shape = (base.in_features, base.out_features)
                self.add_module(name, LowRankProjection(base, *shape, rank, seed * len(OWN) + place))
            else:
                self.add_module(name, WholeProjection(base))


def why_not_copied(attention: nn.Module, rank: int) -> str:
    """Why this attention module cannot have trained projections; "" if it can."""
    owned = [attention._modules.get(name) for name in OWN]
    if not all(hasattr(base, "in_features") and hasattr(base, "out_features") for base in owned):
        return f"its attention has no {', '.join(OWN)} apart from each other"
    whole = all(
        isinstance(base, nn.Linear)
        and base.weight.is_floating_point()
        and base.weight.shape == (base.out_features, base.in_features)
        for base in owned
    )
    if not rank and not whole:
        reason = "carry adapters" if any(hasattr(base, "base_layer") for base in owned) else "are quantised"
        return f"its projections {reason}, no copy of them can be trained: set leave_rank to 16 or so"
    return ""
