"""Both at once: prompt tokens leave early, and of all tokens routers keep some keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from modlab.skips.base import Part, Proof
from modlab.skips.kv import KeyValueSkip
from modlab.skips.leave import first_left, why_nobody_leaves

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modlab.config import MoDConfig
    from modlab.conversion.survey import LayerFacts
    from modlab.execution.routed import RoutedModule


class KeyValueLeaveSkip(KeyValueSkip):
    """`skip="kv+prompt"`: `skip="kv"` in the layers that `layers` names and in all above the point of
    leaving, and `skip="prompt"` above it. Routers there read the state that keys and values come from."""

    name = "kv+prompt"
    parts: ClassVar[tuple[Part, ...]] = ("layer", "attention")
    all_or_none = True
    settings = KeyValueSkip.settings | {"leave_after", "leave_rank"}
    words = replace(KeyValueSkip.words, routed="keys and values, and the upper layers by position")

    def layers(self, config: MoDConfig, num_layers: int) -> list[int]:
        return sorted(
            {*super().layers(config, num_layers), *range(first_left(config, num_layers), num_layers)}
        )

    def first_left(self, config: MoDConfig, num_layers: int) -> int | None:
        return first_left(config, num_layers)

    def decides(self, config: MoDConfig) -> str:
        return (
            f"whether its keys and values stay in the cache beyond the latest {config.keep_recent} tokens. "
            f"Prompt tokens leave after {config.leave_after:.3g} of the layers, all but the last of each "
            "row; keys and values above come from the state there, by projections trained for it"
        )

    def cannot_have(self, model: Any) -> str:
        return why_nobody_leaves(model)

    def cannot_route(self, facts: LayerFacts, config: MoDConfig) -> str:
        from modlab.execution.leaving import why_not_left

        own = super().cannot_route(facts, config)
        above = facts.index >= first_left(config, facts.depth)
        return own or (why_not_left(facts, config, needs_extras=True) if above else "")

    def probe(self, part: Part) -> Proof:
        return "takes given keys, adds its mask" if part == "attention" else "nothing"

    def add_modules(
        self, layer: nn.Module, facts: LayerFacts, config: MoDConfig, device: torch.device
    ) -> None:
        from modlab.execution.projections import PROJECTIONS, Projections

        super().add_modules(layer, facts, config, device)
        if facts.index >= first_left(config, facts.depth):
            layer.add_module(
                PROJECTIONS, Projections(facts.module("attention"), config.leave_rank, facts.index)
            )

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.leaving_keys import LeavingKeysLayer, ProjectedKeys

        return LeavingKeysLayer if part == "layer" else ProjectedKeys
