"""Layers that prompt tokens leave out, in a decoding step: every row runs them, on keys of another state.

Shape letters: B rows, D model dim.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from torch import Tensor, nn

from modlab.engine.attention import CannotCapture
from modlab.engine.compiled import python_norms
from modlab.engine.leaving_prefill import on_state
from modlab.engine.lending import as_one_token_linear, lent
from modlab.engine.step_layers import Forward, KeptKeysStep, RoutedStep, StepPass
from modlab.execution.given_keys import Written
from modlab.execution.projections import OWN, PROJECTIONS, WholeProjection
from modlab.execution.routed import CALL
from modlab.hf.anatomy import attention_name
from modlab.hf.arguments import LayerArguments, hidden_name
from modlab.kernels.aside import aside


class Sourced(nn.Module):
    """A trained projection where the attention module has its own.

    Args:
        trained: the projection.
        base: the module's own.
        batch: rows of the step.

    Attributes:
        source: what is projected instead of what the module is called with, [B, 1, D]; None: just that.
    """

    def __init__(self, trained: Any, base: nn.Module, batch: int) -> None:
        super().__init__()
        self.trained, self.base = trained, base
        self.linear: nn.Linear | None = None
        if isinstance(trained, WholeProjection):
            self.linear = as_one_token_linear(trained.weight, trained.bias, batch)
        self.source: Tensor | None = None

    def forward(self, x_B1D: Tensor) -> Tensor:
        """[B, 1, features out]."""
        x = x_B1D if self.source is None else self.source
        if self.linear is not None and self.linear.weight.dtype == x.dtype:
            return self.linear(x)
        out: Tensor = self.trained(x, self.base)
        return out


class LeavingStep(RoutedStep):
    """A layer that prompt tokens leave out: what its attention projects keys and values from is what it would
    have been given for the state where they leave. The layer is compiled in two pieces around its attention,
    once for all of them.

    Attributes:
        norms: what the layer's norms run on the way there, each compiled to one kernel.
        heard: what it would have been given, once the layer has begun.
    """

    def __init__(self, layer: Any, index: int, step: StepPass) -> None:
        super().__init__(layer, index, step)
        self.attention: Any = layer.get_submodule(attention_name(layer) or "")
        self.attention_forward = self.attention.dense_class.forward
        trained = layer.get_submodule(PROJECTIONS)
        self.projections = {
            name: Sourced(trained.get_submodule(name), self.attention.get_submodule(name), step.tables.batch)
            for name in OWN
        }
        self.norms: dict[nn.Module, Forward] = {
            norm: partial(step.run_dense, type(norm).forward, norm) for norm in python_norms(layer)
        }
        self.listens, self.heard = False, None

    def forwards(self) -> dict[nn.Module, Forward]:
        return super().forwards() | {self.attention: self.run_attention}

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(CALL, None)
        layer_class = self.layer.dense_class
        if self.index == self.routing.first_left:
            self.step.entered = LayerArguments(layer_class, args, kwargs).hidden
        assert self.step.entered is not None, "the layers of a model run in their order"
        arguments = on_state(layer_class, args, kwargs, self.step.entered)
        self.decide_keys(arguments)
        self.listens, self.heard = True, None
        with contextlib.suppress(Written), lent(self.norms):
            arguments.run(partial(layer_class.forward, self.layer), {})
        self.listens = False
        if self.heard is None:
            raise CannotCapture(f"layer {self.index} does not run its attention in every step")
        return self.step.around(self.forward)(self.layer, *args, **kwargs)

    def decide_keys(self, arguments: LayerArguments) -> None:
        """Nothing to decide: all keys and values stay."""

    def run_attention(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's forward with trained projections; or, before, no more than what it is given."""
        if self.listens:
            attention_class: Any = self.attention.dense_class
            self.heard = args[0] if args else kwargs[hidden_name(attention_class)]
            raise Written
        for name in ("k_proj", "v_proj"):
            self.projections[name].source = self.heard
        self.heard = None
        return self.step.run_dense(self.attention_forward, self._twin(), *args, **kwargs)

    def _twin(self) -> nn.Module:
        """The attention module with other projections, as torch.compile knows modules."""
        other: nn.Module = object.__new__(self.attention.dense_class)
        other.__dict__.update(self.attention.__dict__)
        other.__dict__["_modules"] = {**self.attention._modules, **self.projections}
        return other


class LeavingKeysStep(LeavingStep, KeptKeysStep):
    """The same where routers decide whose keys and values stay: they read the state where tokens leave."""

    def decide_keys(self, arguments: LayerArguments) -> None:
        with aside(self.router.keep.device):
            self.decide(arguments.bound.args, arguments.bound.kwargs, None)  # no IF node follows
