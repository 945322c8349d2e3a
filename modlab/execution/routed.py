"""Routed modules: mixins for a layer, its attention or its MLP, one object at a time.

`conversion/extend.py` extends the classes of these objects with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modlab.conversion.extend import Extended
from modlab.errors import ModlabError
from modlab.execution.masked_keys import run_masked_keys
from modlab.execution.packed import run_packed, run_packed_mlp
from modlab.execution.reference import run_masked
from modlab.execution.site import Plan
from modlab.execution.whole_rows import run_keys
from modlab.hf.arguments import LayerArguments
from modlab.routing.record import Decision, ForwardCall
from modlab.routing.router import Router
from modlab.routing.state import eager

CALL = "mod_call"
"""Name under which a routed layer is handed the forward it is part of, together with its own arguments."""


class Carried:
    """A forward's call among a layer's arguments. FSDP2 takes dataclasses apart in training, and would hand
    the layer a copy."""

    def __init__(self, call: ForwardCall | None, off: bool = False) -> None:
        self.call = call
        self.off = off


class RoutedModule(Extended):
    """A module that follows a router's decision: by default for the kept tokens alone (`run_decided`)."""

    mod_plan: Plan
    mod_masked = staticmethod(run_masked)
    mod_packed = staticmethod(run_packed)

    def run_decided(self, arguments: LayerArguments, decision: Decision) -> Any:
        """The module's output in the form that the dense module returns."""
        plan = self.mod_plan
        plan.routing.require_call().ran.add((plan.layer_idx, plan.part))
        run = self.mod_masked if self.runs_masked() else self.mod_packed
        out, rest = run(self, self.dense_forward(), arguments, plan.site(decision))
        return self.joined(arguments.as_given(out), rest, arguments.in_tuple)

    def runs_masked(self) -> bool:
        """Whether this forward takes the masked path: the reference itself, or a what-if pass. With a cache
        (`generate` in train mode) the packed path runs."""
        call = self.mod_plan.routing.require_call()
        return call.masked or (self.training and call.what_if and call.cache is None)

    def dense_forward(self) -> Callable[..., Any]:
        """The forward of the dense class; compiled, where training asks for that (`training/model.py`)."""
        if self.mod_plan.routing.compile_layers:
            dense_class: Any = self.dense_class
            return functools.partial(compiled_forward(dense_class), self)
        return super().forward

    def joined(self, out: Tensor, rest: tuple[Any, ...], in_tuple: bool | None = None) -> Any:
        """The output in the form the dense module returns it; `in_tuple` says whether it did so just now."""
        plan = self.mod_plan
        plan.extra_outputs = len(rest)
        if in_tuple is not None:
            plan.in_tuple = in_tuple
        return (out, *rest) if rest or plan.in_tuple else out


class RoutedLayer(RoutedModule):
    """A decoder layer with a router: decides for every token; its attention or MLP follows the decision."""

    mod_router: Router

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The call travels with the arguments: gradient checkpointing keeps them for its recompute in the
        # backward pass, by when the model may have begun other forwards, and which may be another thread's.
        routing = self.mod_plan.routing
        kwargs.setdefault(CALL, Carried(routing.call, routing.is_off))
        return super().__call__(*args, **kwargs)

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.mod_plan.routing
        carried = kwargs.pop(CALL, None) or Carried(None, routing.is_off)
        if carried.off:
            with routing.turned(off=True):  # a recompute comes when the caller's block has ended
                return self.dense_forward()(*args, **kwargs)
        call = carried.call or routing.require_call()
        rows, time = call.real.shape
        arguments = LayerArguments(self.dense_class, args, kwargs, (rows, time))
        with routing.turned(off=False), routing.within(call.on(arguments.hidden.device)):
            self._check(tuple(arguments.hidden.shape[:2]), (rows, time))
            index = self.mod_plan.layer_idx
            decision = routing.decide(index, self.router_logits, arguments.residual_BTD, self.training)
            return self.run_layer(arguments, decision, args, kwargs)

    def router_logits(self, x_BTD: Tensor) -> Tensor:
        """What the router says, fp32 [B, T] or [B, T, G]."""
        logits: Tensor = self.mod_router(x_BTD)
        return logits

    def run_layer(
        self, arguments: LayerArguments, decision: Decision, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the layer for all tokens: one of its parts follows the decision."""
        return self.dense_forward()(*args, **kwargs)

    def _check(self, run: tuple[int, ...], given: tuple[int, ...]) -> None:
        """Refuses what routing by token and layer cannot describe."""
        if run != given:
            raise ModlabError(
                f"the layers of this architecture run on {list(run)} positions where the input has "
                f"{list(given)} tokens: it adds or merges some, so that routing has no token to decide for."
            )
        plan = self.mod_plan
        if plan.layer_idx in plan.routing.require_call().decisions and not self.training:
            raise ModlabError(
                f"layer {plan.layer_idx} ran twice in one forward: architectures that loop over their layers "
                "cannot be routed."
            )


class SkippableLayer(RoutedLayer):
    """A decoder layer that runs for the tokens that its router keeps; the others pass it by."""

    def run_layer(
        self, arguments: LayerArguments, decision: Decision, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self.run_decided(arguments, decision)


class RoutedBranch(RoutedModule):
    """An attention module that runs for the tokens that its layer's router keeps, and for no others."""

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.mod_plan
        if plan.routing.is_off:
            return self.dense_forward()(*args, **kwargs)
        arguments = LayerArguments(self.dense_class, args, kwargs)
        return self.run_decided(arguments, plan.routing.require_call().decisions[plan.layer_idx])


class RoutedKeys(RoutedBranch):
    """An attention module that runs for every token; a router decides whose keys and values stay."""

    mod_masked = staticmethod(run_masked_keys)
    mod_packed = staticmethod(run_keys)

    def runs_masked(self) -> bool:
        """In training too: there is no token to leave out."""
        return super().runs_masked() or (self.training and self.mod_plan.routing.require_call().cache is None)


class RoutedMLP(RoutedBranch):
    """An MLP that runs for the tokens that its layer's router keeps, and adds nothing to the others."""

    mod_packed = staticmethod(run_packed_mlp)


@functools.cache
def compiled_forward(dense_class: Any) -> Callable[..., Any]:
    """`dense_class.forward` by torch.compile: one function for all modules of the class."""
    return torch.compile(dense_class.forward)
