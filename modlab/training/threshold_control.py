"""Thresholds that follow the gates during training, so that a wanted share of tokens is kept at every step.

The other way round, a fixed threshold towards which a penalty pushes the gates, ends wherever the penalty and
the loss balance: 0.22 asked, 0.249 got (docs/log.md).

Shape letters: B rows, T tokens, R routed layers, Z bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modlab.routing.record import by_gate

if TYPE_CHECKING:
    from modlab.routing.record import RoutingStep

EDGE = 16.0  # router logits beyond this, on either side, count as this
BINS = 4096  # 0.008 of a logit each
DECAY = 0.7  # of a step's weight, each further step: gates move, and one step sees thousands of them


class ThresholdControl:
    """A running histogram of router logits, and the thresholds that keep a share of them.

    Args:
        layers: routed layers, ascending.
        per_layer: each layer keeps the share; otherwise all layers have one threshold, and each keeps what
            that lets pass.
        device: where the model is.
    """

    def __init__(self, layers: list[int], per_layer: bool, device: torch.device) -> None:
        self.layers = layers
        self.per_layer = per_layer
        self.counts_RZ = torch.zeros(len(layers), BINS, device=device)
        self.seen_RZ = torch.zeros_like(self.counts_RZ)

    def see(self, step: RoutingStep, keep_first: int, offsets: dict[int, float] | None = None) -> None:
        """Takes in a recorded forward, of which there may be several a step.

        Args:
            step: logits [B, T] or, of several gates, [B, T, G] by layer. Tokens that are always kept count as
                gates of 1.
            keep_first: first real tokens of a row that are always kept.
            offsets: by layer, what is taken off its logits; nothing by default.
        """
        forced_BT = step.position_ids < keep_first
        new = [
            self._histogram(step.logit[i] - (offsets or {}).get(i, 0.0), step.real, forced_BT)
            for i in self.layers
        ]
        self.seen_RZ += torch.stack(new)

    def advance(self, summed: Callable[[Tensor], Tensor]) -> None:
        """A step is done: what it has seen counts from here on, and what earlier ones have seen counts less.

        Args:
            summed: gives the sum of a tensor over processes.
        """
        self.counts_RZ.mul_(DECAY).add_(summed(self.seen_RZ))
        self.seen_RZ.zero_()

    def thresholds(self, keep_ratio: float) -> dict[int, Tensor]:
        """Scalar fp32 thresholds by layer, on the device (nothing is waited for): what keeps `keep_ratio` of
        the tokens seen lately. Everything is kept while nothing has been seen."""
        counts = self.counts_RZ if self.per_layer else self.counts_RZ.sum(0, keepdim=True)
        below = counts.cumsum(1)
        total = below[:, -1:]
        wanted = (1 - keep_ratio) * total
        # The lower edge of the bin in which `wanted` is reached: gates too alike to be told apart are all
        # kept rather than all skipped.
        bin_R1 = (below < wanted - 1e-6 * total).sum(1, keepdim=True).clamp(max=BINS - 1)
        p = torch.sigmoid(bin_R1 * (2 * EDGE / BINS) - EDGE)[:, 0]
        p = p.clamp(1e-6, 1 - 1e-6).expand(len(self.layers))
        return dict(zip(self.layers, p.unbind(), strict=True))

    def expected(self, keep_B: Tensor) -> Tensor:
        """Logits [B] above which, noise included, the expected share of the tokens seen lately is `keep_B`:
        the mean of sigmoid(logit - threshold). 0 while nothing has been seen."""
        counts_Z = self.counts_RZ.sum(0)
        share_Z = counts_Z / counts_Z.sum().clamp(min=1)
        width = 2 * EDGE / BINS
        centre_Z = torch.arange(BINS, device=counts_Z.device) * width - EDGE + width / 2
        low_B = torch.full_like(keep_B, -2 * EDGE)
        high_B = torch.full_like(keep_B, 2 * EDGE)
        for _ in range(24):
            middle_B = (low_B + high_B) / 2
            kept_B = torch.sigmoid(centre_Z - middle_B[:, None]) @ share_Z
            low_B = torch.where(kept_B > keep_B, middle_B, low_B)
            high_B = torch.where(kept_B > keep_B, high_B, middle_B)
        return torch.where(counts_Z.sum() > 0, (low_B + high_B) / 2, 0.0)

    @staticmethod
    def _histogram(logit: Tensor, real_BT: Tensor, forced_BT: Tensor) -> Tensor:
        logit_BTG = by_gate(logit.detach())
        at = ((logit_BTG + EDGE) * (BINS / (2 * EDGE))).long().clamp(0, BINS - 1)
        at = torch.where(forced_BT[..., None], BINS - 1, at)
        weight = real_BT.float()[..., None].expand(at.shape)
        return torch.zeros(BINS, device=at.device).index_add_(0, at.flatten(), weight.flatten())

    def state(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return {"counts": self.counts_RZ}

    def restore(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.counts_RZ.copy_(state["counts"])
