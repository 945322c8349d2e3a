"""What one forward knows and what is noted of it: decisions, recordings, the call that routed layers share.

Shape letters: B rows, T tokens in, K keys seen, cached ones included, G gates of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from modlab.cache.ragged import RaggedCache
    from modlab.routing.noise import Noise

OverrideFn = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Decision:
    """What one router said about one forward: logit and gate fp32, keep bool; all [B, T], or [B, T, G] where
    the skip has several gates a layer."""

    logit: Tensor
    gate: Tensor
    keep: Tensor


@dataclass
class RoutingStep:
    """One forward of the model, as the recorder saw it; dicts are keyed by layer index, tensors are [B, T]
    (or [B, T, G] where a layer has several gates).

    Attributes:
        gate: sigmoid of the router logit, fp32.
        logit: router logit, fp32.
        keep: True where the layer ran for the token (with skip="kv", where its keys and values stay).
        real: True where the token is not padding.
        position_ids: index of the token among the real tokens of its text, -1 for leading padding.
    """

    real: Tensor
    position_ids: Tensor
    gate: dict[int, Tensor] = field(default_factory=dict)
    logit: dict[int, Tensor] = field(default_factory=dict)
    keep: dict[int, Tensor] = field(default_factory=dict)


def by_gate(value: Tensor) -> Tensor:
    """A recorded tensor with an axis for its gates, [B, T, G]: G is 1 where it has none."""
    return value if value.dim() == 3 else value[..., None]


@dataclass
class Recording:
    """Every forward inside a `record_routing` block, oldest first."""

    steps: list[RoutingStep] = field(default_factory=list)
    detach: bool = True


@dataclass
class ForwardCall:
    """What the routed layers need to know about the forward they are part of.

    Attributes:
        real: bool [B, T], False for padding.
        position_ids: long [B, T], index among the real tokens of the text (-1 for leading padding). A text is
            a row, or one of the documents that restarting positions mark in it.
        columns: long [T], absolute column of each token in the padded batch, cached columns counted.
        num_columns: columns seen once this forward is done.
        cache: the ragged cache that is written, or None.
        steps: the open recordings, each with its entry for this forward.
        thresholds, what_if, masked, override, noise: the routing's, as they stood when the forward began: a
            gradient-checkpoint recompute decides as the forward did.
        padding_mask: bool [B, K] over all columns seen, False for padding; None where there is none.
        documents: long [B, T], the document of each token where a row packs several; None where it does not.
        decisions: by layer index.
        ran: the parts that have run, as (layer index, part).
    """

    real: Tensor
    position_ids: Tensor
    columns: Tensor
    num_columns: int
    cache: RaggedCache | None
    steps: list[tuple[Recording, RoutingStep]]
    thresholds: dict[int, float]
    what_if: bool
    masked: bool
    override: OverrideFn | None
    noise: Noise | None = None
    padding_mask: Tensor | None = None
    documents: Tensor | None = None
    decisions: dict[int, Decision] = field(default_factory=dict)
    ran: set[tuple[int, str]] = field(default_factory=set)

    @functools.cached_property
    def has_gaps(self) -> bool:
        """Whether padding stands between the tokens of a row (one host sync a forward, where there is a mask
        and somebody asks)."""
        if self.padding_mask is None:
            return False
        behind_a_token = (self.real.cumsum(1) > 0) & ~self.real
        return bool(((behind_a_token.cumsum(1) > 0) & self.real).any())
