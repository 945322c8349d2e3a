"""One branch of a layer alone: its attention, or its MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modlab.skips.base import Part, Skip, Words

if TYPE_CHECKING:
    from modlab.config import MoDConfig
    from modlab.execution.routed import RoutedModule


class AttentionSkip(Skip):
    """`skip="attention"`: a token that is not kept has no attention, no keys and no values; its MLP runs."""

    name = "attention"
    parts = ("attention",)
    words = Words(routed="attention alone", part="the layer's attention")

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.routed import RoutedBranch

        return RoutedBranch

    def why_no_engine(self, config: MoDConfig) -> str:
        return ""


class MLPSkip(Skip):
    """`skip="mlp"`: a token that is not kept leaves out the MLP; all keys and values stay."""

    name = "mlp"
    parts = ("mlp",)
    words = Words(routed="MLPs alone", part="the layer's MLP")
    stores_all = True
    index_bytes = 0

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.routed import RoutedMLP

        return RoutedMLP

    def why_no_engine(self, config: MoDConfig) -> str:
        return ""
