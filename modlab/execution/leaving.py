"""Upper layers of a model whose prompt tokens leave early (`skip="prompt"`).

In these layers the keys and values of *every* token are projected from the state with which it entered the
first of them. So what a token does above is nobody's business but its own: a token whose output nobody asks
for leaves there, and the others compute what they would have computed, to the last rounding. A layer runs in
two passes (`given_keys.py`):

1. writing: keys and values of all tokens, from that state, into the cache; the layer stops there.
2. reading: the tokens that go on (all of them in decoding, in training and where all logits are asked for)
   attend to what was written, with trained queries, and pass the layer in full.

Shape letters: B rows, T tokens in, S tokens that go on (of the row that has the most).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.execution.given_keys import (
    ReadingView,
    States,
    View,
    cache_name,
    can_gather,
    going_on,
    put_back,
    read,
    reading,
    twin,
    write,
    writing,
)
from modlab.execution.projections import Projections, why_not_copied
from modlab.execution.routed import RoutedLayer, RoutedModule
from modlab.hf.arguments import LayerArguments, forward_signature
from modlab.hf.names import checkpoints_reentrantly
from modlab.routing.record import Decision, ForwardCall
from modlab.routing.rule import over
from modlab.routing.state import eager

if TYPE_CHECKING:
    from modlab.config import MoDConfig
    from modlab.conversion.survey import LayerFacts

SURE = 8.0
"""Logit of a token that goes on; of one that leaves it is the negative."""


class ProjectedAttention(RoutedModule):
    """An attention module that runs as the twin which the view among its arguments asks for."""

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.mod_plan
        if plan.routing.is_off:
            return self.dense_forward()(*args, **kwargs)
        view = next((v for v in (*args, *kwargs.values()) if isinstance(v, View)), None)
        if view is None:
            raise ModlabError(
                f"the attention of layer {plan.layer_idx} was called past its layer, or the layer does not "
                "hand its cache on: keys and values of skip='prompt' come from another layer's state."
            )
        plan.routing.require_call().ran.add((plan.layer_idx, plan.part))
        dense_class: Any = self.dense_class
        return dense_class.forward(twin(self, view.projections), *args, **kwargs)


class LeavingLayer(RoutedLayer):
    """A decoder layer above the point where prompt tokens leave."""

    mod_projections: Projections

    def router_logits(self, x_BTD: Tensor) -> Tensor:
        """No router is asked: the call says who goes on."""
        routing = self.mod_plan.routing
        goes_on = routing.skip.decide(x_BTD, x_BTD, routing.require_call(), self.mod_plan.layer_idx)
        return torch.where(goes_on, SURE, -SURE)

    def dense_forward(self) -> Callable[..., Any]:
        """The forward of the dense class, never compiled: two passes with views in them break its graph."""
        return super(RoutedModule, self).forward

    def run_layer(
        self, arguments: LayerArguments, decision: Decision, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plan = self.mod_plan
        call = plan.routing.require_call()
        call.ran.add((plan.layer_idx, plan.part))
        states = self._written(arguments, self.entered(arguments.hidden))
        everybody = call.asked is None and call.override is None
        index_BS = None if everybody or self.runs_masked() else going_on(decision.keep)
        if index_BS is None or not can_gather(arguments, index_BS, plan.routing.attention):
            changes = {self._cache_name(arguments): self._reading(arguments, states)}
            out, rest = arguments.run(self.dense_forward(), changes)
            if not everybody:
                out = torch.where(over(decision.keep, out), out, arguments.hidden)
        else:
            out, rest = self._run_some(arguments, decision.keep, index_BS, states, call)
        return self.joined(arguments.as_given(out), rest, arguments.in_tuple)

    def entered(self, hidden_BTD: Tensor) -> Tensor:
        """The state with which all tokens entered the first layer that they may leave out: `hidden_BTD`, if
        that is this one."""
        routing = self.mod_plan.routing
        call, first = routing.require_call(), routing.first_left
        if self.training and checkpoints_reentrantly(self):
            raise ModlabError(
                "reentrant gradient checkpointing goes back through each layer by itself, but layers from "
                f"{first} on share the state that prompt tokens leave with: "
                'model.gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        if self.mod_plan.layer_idx == first:
            call.entered[first] = hidden_BTD
        return call.entered[first].to(hidden_BTD.device)

    def runs_masked(self) -> bool:
        """In training too: everybody's loss is wanted."""
        return self.training or self.mod_plan.routing.require_call().masked

    def _written(self, arguments: LayerArguments, entered_BTD: Tensor) -> States:
        """Keys and values of all tokens, cached ones included; the cache holds them from here on."""
        view = writing(self._attention(), self.mod_projections, arguments.cache())
        changes = {arguments.hidden_name: entered_BTD, self._cache_name(arguments): view}
        return write(view, lambda: arguments.run(self.dense_forward(), changes), self.mod_plan.layer_idx)

    def _reading(self, arguments: LayerArguments, states: States) -> ReadingView:
        return reading(self._attention(), self.mod_projections, arguments.cache(), states)

    def _run_some(
        self,
        arguments: LayerArguments,
        keep_BT: Tensor,
        index_BS: Tensor,
        states: States,
        call: ForwardCall,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The layer for the tokens `index_BS` alone; the others pass by."""
        x = arguments.hidden
        if not index_BS.shape[1]:
            return x, (None,) * self.mod_plan.extra_outputs
        y_BSD, rest = read(
            arguments,
            self.dense_forward(),
            self._cache_name(arguments),
            self._reading(arguments, states),
            index_BS,
            call,
            self.mod_plan.routing.attention,
        )
        return put_back(x, y_BSD, keep_BT, index_BS), rest

    def _attention(self) -> nn.Module:
        return next(module for module in self.modules() if isinstance(module, ProjectedAttention))

    def _cache_name(self, arguments: LayerArguments) -> str:
        name = arguments.cache_name() or cache_name(self.dense_class, self._attention())
        assert name is not None, "convert refuses a layer without"
        return name


def why_not_left(facts: LayerFacts, config: MoDConfig, needs_extras: bool = False) -> str:
    """Why prompt tokens cannot leave this layer out; "" if they can.

    Args:
        needs_extras: whether its attention has to take an argument that it does not know.
    """
    if facts.attention is None:
        return ""  # said better elsewhere
    attention = facts.module("attention")
    if cache_name(type(facts.layer), attention) is None:
        return "it takes no cache of keys and values"
    attention_class: Any = type(attention)
    parameters = forward_signature(attention_class).parameters.values()
    if needs_extras and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return "its attention takes no further arguments"
    return why_not_copied(attention, config.leave_rank)
