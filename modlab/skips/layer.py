"""Whole layers: a token that is not kept passes a layer as if it were not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modlab.skips.base import GateForm, Part, Skip, Words

if TYPE_CHECKING:
    from modlab.config import MoDConfig
    from modlab.execution.routed import RoutedModule


class LayerSkip(Skip):
    """`skip="layer"`: Mixture-of-Depths as published; saves operations and cache, at the highest loss."""

    name = "layer"
    parts = ("layer",)
    words = Words(routed="whole layers", part="the layer")

    def gate_form(self, config: MoDConfig, part: Part) -> GateForm:
        """The paper's gate stands inside the layer, on both branches."""
        return "scaled" if config.gate == "paper" else config.gate

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.routed import SkippableLayer

        return SkippableLayer

    def why_no_engine(self, config: MoDConfig) -> str:
        return ""
