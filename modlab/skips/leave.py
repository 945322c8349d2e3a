"""The top of the model: tokens of a prompt leave it early, all but those whose output is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError
from modlab.skips.base import ROUTERS, GateForm, Part, Proof, Skip, Words

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from modlab.config import MoDConfig
    from modlab.conversion.survey import LayerFacts
    from modlab.execution.routed import RoutedModule
    from modlab.routing.record import ForwardCall


class LeaveSkip(Skip):
    """`skip="prompt"`: above layer `leave_after` keys and values of every token are projected from the state
    that it had there, by trained copies of the projections; so prompt tokens leave there, and only each row's
    last one goes on (published as SwiftKV, arXiv 2410.03960).

    Leaving changes no number: tokens that go on compute the same. Generated tokens, training, losses and
    whatever else asks for the logits of all tokens run all layers.
    """

    name = "prompt"
    parts = ("layer", "attention")
    words = Words(
        routed="the upper layers, by position",
        part="the layer",
        title="Which token runs which layer",
        left="has left",
        past="gone",
        legend_left="token has left",
    )
    stores_all = True
    index_bytes = 0
    all_or_none = True
    decides_itself = True
    settings = frozenset({"leave_after", "leave_rank"})

    def check(self, config: MoDConfig) -> None:
        """Nothing is learnt about who leaves, so nothing about routers can be set."""
        for name in ("layers", *sorted(ROUTERS)):
            if getattr(config, name) != type(config).__dataclass_fields__[name].default:
                raise ModlabError(
                    f"MoDConfig(skip='prompt', {name}={getattr(config, name)!r}): who leaves follows from "
                    f"the position alone, and where from leave_after. Leave {name} out."
                )

    def layers(self, config: MoDConfig, num_layers: int) -> list[int]:
        """Those above the point of leaving, at least one on either side of it."""
        return list(range(first_left(config, num_layers), num_layers))

    def first_left(self, config: MoDConfig, num_layers: int) -> int | None:
        return first_left(config, num_layers)

    def decides(self, config: MoDConfig) -> str:
        return (
            "whether it runs: prompt tokens leave below it, all but the last of each row, while generated "
            "tokens, training and whatever needs the logits of all tokens run it. Keys and values come from "
            f"the state after {config.leave_after:.3g} of the layers, by projections trained for it"
        )

    def gate_form(self, config: MoDConfig, part: Part) -> GateForm:
        """The gate changes no output."""
        return "stored"

    def cannot_have(self, model: Any) -> str:
        return why_nobody_leaves(model)

    def cannot_route(self, facts: LayerFacts, config: MoDConfig) -> str:
        from modlab.execution.leaving import why_not_left

        return why_not_left(facts, config)

    def probe(self, part: Part) -> Proof:
        return "takes given keys" if part == "attention" else "nothing"

    def add_modules(
        self, layer: nn.Module, facts: LayerFacts, config: MoDConfig, device: torch.device
    ) -> None:
        """Trained projections, and no router."""
        from modlab.execution.projections import PROJECTIONS, Projections

        layer.add_module(PROJECTIONS, Projections(facts.module("attention"), config.leave_rank, facts.index))

    def mixin(self, part: Part) -> type[RoutedModule]:
        from modlab.execution.leaving import LeavingLayer, ProjectedAttention

        return LeavingLayer if part == "layer" else ProjectedAttention

    def decide(self, gate: Tensor, logit: Tensor, call: ForwardCall, layer_idx: int) -> Tensor:
        """Tokens whose output is asked for, and each row's last one; bool [B, T]."""
        if call.asked is None:
            return call.real
        behind_BT = call.real.flip(1).cumsum(1).flip(1)
        return (call.asked | (behind_BT == 1)) & call.real

    def pairs(self, length: float, keep_ratio: float, config: MoDConfig) -> float:
        """The tokens that go on are the latest: each sees the whole row."""
        return keep_ratio * length * (length - keep_ratio * length / 2)

    def why_no_engine(self, config: MoDConfig) -> str:
        return ""


def first_left(config: MoDConfig, num_layers: int) -> int:
    """Index of the first layer that prompt tokens leave out; at least one is on either side.

    Raises:
        ModlabError: there is one layer alone.
    """
    if num_layers < 2:
        raise ModlabError(
            f"skip={config.skip!r} needs two decoder layers: one to leave after, one to leave out."
        )
    return min(max(round(config.leave_after * num_layers), 1), num_layers - 1)


def why_nobody_leaves(model: Any) -> str:
    """Why no token of a prompt could leave this model; "" if some could."""
    from modlab.hf.ranks import mesh_of
    from modlab.routing.forward import asks_for_logits

    if mesh_of(model) is not None:
        return (
            "its weights are shared across ranks (tensor parallelism), and copies of projections are whole; "
            "skip='kv' runs there"
        )
    return (
        "" if asks_for_logits(model) else "it computes the logits of all tokens of a prompt (logits_to_keep)"
    )
