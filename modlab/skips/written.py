"""A layer's work, token by token, with the keys and values of all tokens written all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modlab.skips.base import Part, Proof, Skip, Words

if TYPE_CHECKING:
    from modlab.config import MoDConfig
    from modlab.conversion.survey import LayerFacts
    from modlab.execution.routed import RoutedModule
    from modlab.routing.record import Decision


class WrittenSkip(Skip):
    """`skip="written"`: a token that is not kept has no attention and no MLP, but its keys and values are
    there for others (FlexiDepth, arXiv 2503.23798, found that pretrained models need them)."""

    name = "written"
    parts = ("attention", "mlp")
    words = Words(routed="attention and MLP, keys and values written", part="the layer's attention and MLP")
    stores_all = True
    index_bytes = 0

    def cannot_route(self, facts: LayerFacts, config: MoDConfig) -> str:
        from modlab.execution.given_keys import cache_name
        from modlab.execution.projections import why_not_copied

        if facts.attention is None:
            return ""  # said better elsewhere
        attention = facts.module("attention")
        if cache_name(type(attention), attention) is None:
            return "its attention takes no cache of keys and values"
        return why_not_copied(attention, rank=1)

    def probe(self, part: Part) -> Proof:
        return "takes given keys, gives zero" if part == "attention" else "gives zero"

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.routed import RoutedMLP
        from modlab.execution.written import WrittenAttention

        return WrittenAttention if part == "attention" else RoutedMLP

    def pairs(self, length: float, keep_ratio: float, config: MoDConfig) -> float:
        """Kept queries see all keys before them."""
        return keep_ratio * length**2 / 2


class SublayerSkip(WrittenSkip):
    """`skip="sublayers"`: the same with two gates a layer, one for its attention and one for its MLP."""

    name = "sublayers"
    words = Words(
        routed="attention and MLP apart, keys and values written",
        part="the layer's attention and its MLP, each on its own",
    )
    several_gates = True

    def gates(self, facts: LayerFacts, config: MoDConfig) -> int:
        return len(self.parts)

    def decision_for(self, part: Part, decision: Decision) -> Decision:
        from modlab.routing.record import Decision

        at = self.parts.index(part)
        return Decision(decision.logit[..., at], decision.gate[..., at], decision.keep[..., at])
