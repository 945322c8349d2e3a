"""What one forward knows and what is noted of it: decisions, recordings, the call that routed layers share.

Shape letters: B rows, T tokens in, K keys seen, cached ones included, G gates of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modlab.routing.router import logit_of

if TYPE_CHECKING:
    from modlab.cache.ragged import RaggedCache
    from modlab.cache.range import KVRange
    from modlab.execution.projections import Projections
    from modlab.routing.noise import Noise

OverrideFn = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Decision:
    """What one router said about one forward: logit and gate fp32, keep bool; all [B, T], or [B, T, G] where
    the skip has several gates a layer."""

    logit: Tensor
    gate: Tensor
    keep: Tensor

    def of_gates(self, gates: slice) -> Decision:
        """What was said by some of the G gates: [B, T, some], or [B, T] of a single one."""
        some = (value[..., gates] for value in (self.logit, self.gate, self.keep))
        return Decision(*(value.squeeze(-1) for value in some))


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


def kept_share(keep: Tensor) -> Tensor:
    """Share of a layer's gates that keep each token, fp32 [B, T]: 0 or 1 where it has one gate."""
    return by_gate(keep).float().mean(-1)


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
        unpadded: whether it is known that there is none; False where nobody has looked.
        position_ids: long [B, T], index among the real tokens of the text (-1 for leading padding). A text is
            a row, or one of the documents that restarting positions mark in it.
        columns: long [T], absolute column of each token in the padded batch, cached columns counted.
        num_columns: columns seen once this forward is done.
        cache: the ragged cache that is written, or None.
        steps: the open recordings, each with its entry for this forward.
        thresholds, what_if, masked, override, recent, noise, row_shift, ranges: the routing's, as they stood
            when the forward began: a gradient-checkpoint recompute decides as the forward did.
        generates: whether it is one of `generate`: it decides as in eval mode, and `what_if` is False.
        padding_mask: bool [B, K] over all columns seen, False for padding; None where there is none.
        documents: long [B, T], the document of each token where a row packs several; None where it does not.
        masks: the layers' own masks that were looked at, with what was found, by id.
        decisions: by layer index.
        ran: the parts that have run, as (layer index, part).
        elsewhere: this call on other devices (`on`).
        asked: bool [T], the tokens whose output the caller asked for (`logits_to_keep`); None: all of them.
        entered: by layer index, the state with which all tokens entered that layer, where those above it need
            it once more.
        sources: by layer index, what its attention projects keys and values from, if not from its own input,
            and the projections that do.
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
    recent: int | None
    unpadded: bool = False
    noise: Noise | None = None
    row_shift: Tensor | None = None
    ranges: Mapping[int, KVRange] = field(default_factory=dict)
    generates: bool = False
    padding_mask: Tensor | None = None
    documents: Tensor | None = None
    masks: dict[int, MaskFacts] = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)
    ran: set[tuple[int, str]] = field(default_factory=set)
    elsewhere: dict[torch.device, ForwardCall] = field(default_factory=dict)
    asked: Tensor | None = None
    entered: dict[int, Tensor] = field(default_factory=dict)
    sources: dict[int, tuple[Tensor, Projections]] = field(default_factory=dict)

    @functools.cached_property
    def has_gaps(self) -> bool:
        """Whether padding stands between the tokens of a row (one host sync a forward, where there is a mask
        and somebody asks)."""
        if self.padding_mask is None:
            return False
        behind_a_token = (self.real.cumsum(1) > 0) & ~self.real
        return bool(((behind_a_token.cumsum(1) > 0) & self.real).any())

    @functools.cached_property
    def pads_first(self) -> bool:
        """Whether padding stands before a token of its row (one host sync a forward, where there is a mask
        and somebody asks)."""
        return self.padding_mask is not None and bool((((~self.real).cumsum(1) > 0) & self.real).any())

    def on(self, device: torch.device) -> ForwardCall:
        """This call for a layer on another device: its tensors there, decisions and recordings shared."""
        if device == self.real.device:
            return self
        known = self.elsewhere.get(device)
        if known is None:
            moved: dict[str, Any] = {
                name: None if value is None else value.to(device)
                for name in (
                    "real",
                    "position_ids",
                    "columns",
                    "padding_mask",
                    "documents",
                    "asked",
                    "row_shift",
                )
                for value in [getattr(self, name)]
            }
            known = self.elsewhere[device] = replace(self, **moved, elsewhere={})
        return known

    def threshold(self, layer_idx: int, gate: Tensor) -> float | Tensor:
        """p of a layer, or of each row, shaped to be compared with its gates [B, T] or [B, T, G]."""
        p = self.thresholds[layer_idx]
        if self.row_shift is None:
            return p
        return torch.sigmoid(logit_of(p) + self.row_shift[(..., *[None] * (gate.dim() - 1))])

    def threshold_logit(self, layer_idx: int, logit: Tensor) -> float | Tensor:
        """The same as a logit, to be compared with the router's."""
        own = logit_of(self.thresholds[layer_idx])
        return own if self.row_shift is None else own + self.row_shift[(..., *[None] * (logit.dim() - 1))]

    def is_causal(self, mask: Any) -> bool:
        """Whether a layer's own mask says no more than that a token sees the tokens not after it."""
        return self._facts(mask).causal

    def is_plain(self, mask: Any) -> bool:
        """Whether it says no more than that and which documents there are."""
        return self._facts(mask).plain

    def sees_future(self, mask: Any) -> bool:
        """Whether some token sees a later one."""
        return self._facts(mask).sees_future

    def _facts(self, mask: Any) -> MaskFacts:
        """What the mask is: asked once a forward of each mask (one host sync)."""
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            together = self.documents is None
            return MaskFacts(mask, causal=together, plain=together, sees_future=False)
        known = self.masks.get(id(mask))
        if known is None or known.mask is not mask:
            known = self.masks[id(mask)] = self._look(mask)
        return known

    def _look(self, mask_BNTK: Tensor) -> MaskFacts:
        T, K = mask_BNTK.shape[2:]
        additive = mask_BNTK.is_floating_point()
        visible = mask_BNTK > torch.finfo(mask_BNTK.dtype).min / 2 if additive else mask_BNTK
        at_K = torch.arange(self.num_columns - K, self.num_columns, device=mask_BNTK.device)
        at_T = self.columns[-T:].to(mask_BNTK.device)
        past_TK = at_K <= at_T[:, None]
        future = visible.logical_and(~past_TK).any()
        if additive or visible.dtype != torch.bool or mask_BNTK.shape[1] != 1:
            return MaskFacts(mask_BNTK, causal=False, plain=False, sees_future=bool(future))
        seen = past_TK if self.padding_mask is None else past_TK & self.padding_mask[:, None, None, -K:]
        asking = self.real[:, None, :, None]  # what padding sees is nobody's concern
        causal = ((visible == seen) | ~asking).all()
        plain = causal
        if self.documents is not None and K == T:
            seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
            plain = ((visible == seen) | ~asking).all()
        causal_, plain_, future_ = torch.stack([causal, plain, future]).tolist()
        return MaskFacts(mask_BNTK, causal_, plain_, future_)


@dataclass(frozen=True)
class MaskFacts:
    """What a layer's own mask [B or 1, N or 1, T, K] was found to be, see `ForwardCall`."""

    mask: Any
    causal: bool
    plain: bool
    sees_future: bool
