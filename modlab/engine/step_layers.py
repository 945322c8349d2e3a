"""How a decoder layer runs in one decoding step: the GPU skips what no row needs.

As in a prefill, modules run methods of the objects of this file while the step runs or is captured; one class
a form.

Shape letters: B rows, T = 1 token in, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modlab.engine.attention import CannotCapture
from modlab.engine.branch import Branch
from modlab.engine.tables import Tables
from modlab.execution.gate import gated_output, scaled_branches
from modlab.execution.routed import CALL, RoutedLayer
from modlab.hf.anatomy import attention_name, mlp_name
from modlab.hf.arguments import LayerArguments
from modlab.kernels.aside import aside
from modlab.kernels.decode_router import RouterCall
from modlab.routing.router import HiddenRouter
from modlab.routing.state import Routing
from modlab.skips.base import Part

Forward = Callable[..., Any]

UNDECIDED = object()


class StepPass:
    """What the layers share in one pass of a decoding step over them.

    Args:
        routing: of the model; None for a dense one.
        tables: what the step's kernels read.
        branch: how a routed layer is skipped.
        graph: the CUDA graph being captured, or None.
        compiled: makes a function fast, or returns it as it is.

    Attributes:
        run_dense, run_kept: compiled once for all layers.
        entered: state [B, 1, D] with which the tokens entered the first layer that prompts leave out.
    """

    def __init__(
        self,
        routing: Routing | None,
        tables: Tables,
        branch: Branch,
        graph: Any,
        compiled: Callable[[Forward], Forward],
    ) -> None:
        self.routing, self.tables, self.branch, self.graph = routing, tables, branch, graph
        self.run_dense, self.run_kept = compiled(_run), compiled(_run_kept)
        self._compiled = compiled
        self._around: dict[Forward, Forward] = {}
        self.entered: Tensor | None = None

    def around(self, forward: Forward) -> Forward:
        """The forward of layers that a routed sublayer cuts in two, compiled once for all of them."""
        if forward not in self._around:
            self._around[forward] = self._compiled(forward)
        return self._around[forward]


class DenseStep:
    """A layer without a router.

    Args:
        layer: the decoder layer.
        index: its own.
        step: what it shares with the other layers.
    """

    def __init__(self, layer: Any, index: int, step: StepPass) -> None:
        self.layer, self.index, self.step = layer, index, step
        self.forward = layer.dense_class.forward if isinstance(layer, RoutedLayer) else type(layer).forward

    def forwards(self) -> dict[nn.Module, Forward]:
        """What the layer and modules inside it run instead of their own forwards."""
        return {self.layer: self.run_layer}

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        return self.step.run_dense(self.forward, self.layer, *args, **kwargs)


class RoutedStep(DenseStep):
    """A layer with a router: it decides at its entrance.

    Attributes:
        decided: what the branch made of the decision, until it is used.
        gated: the part of the layer whose output the gate enters.
        form: in which form, in the terms of `execution/gate.py`.
    """

    gated: ClassVar[Part] = "layer"

    def __init__(self, layer: Any, index: int, step: StepPass) -> None:
        super().__init__(layer, index, step)
        assert step.routing is not None
        self.routing, self.router = step.routing, step.tables.routers[index]
        self.form = self.routing.skip.gate_form(self.routing.config, self.gated)
        self.decided: Any = UNDECIDED

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any], graph: Any) -> LayerArguments:
        """Decides for the new tokens; the layer's arguments, `kwargs` without modlab's own.

        Args:
            graph: the one that an IF node on this decision will stand in; None if no node follows.
        """
        kwargs.pop(CALL, None)
        arguments = LayerArguments(self.layer.dense_class, args, kwargs)
        self.decided = self.step.branch.decide(graph, self._router_call(arguments))
        return arguments

    def run_if_kept(self, module: Any, body: Callable[[], None]) -> None:
        """Runs `body` if any row keeps its token.

        Raises:
            CannotCapture: it is the second time since the decision, of which an IF node takes one.
        """
        if self.decided is UNDECIDED:
            raise CannotCapture(f"its layers run their {type(module).__name__} more than once a step")
        decided, self.decided = self.decided, UNDECIDED
        self.step.branch.run_decided(self.step.graph, decided, body)

    def _router_call(self, arguments: LayerArguments) -> RouterCall:
        tables, router, weights = self.step.tables, self.router, self.layer.mod_router
        hidden = isinstance(weights, HiddenRouter)
        return RouterCall(
            x_BD=arguments.residual_BTD[:, 0],
            weight=weights.weight,
            bias_A=weights.bias,
            threshold_1=router.threshold,
            position_B=tables.position[:, 0],
            keep_first=self.routing.config.keep_first,
            forced=tables.forced.get(self.index),
            forced_3=router.forced,
            gate=router.gate,
            keep=router.keep,
            any_1=router.any,
            into_UD=weights.into if hidden else None,
            out_AU=weights.out if hidden else None,
        )


class WholeLayerStep(RoutedStep):
    """The layer runs if any row keeps its token, and writes the rows that do."""

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        layer, router = self.layer, self.router
        x_B1D = self.decide(args, kwargs, self.step.graph).hidden
        # Hooks put the paper's gate inside the layer, and hooks are not compiled.
        run_kept, weight = self.step.run_kept, None
        if self.form == "scaled":
            run_kept, weight = _run_kept, router.gate[:, None]

        def body() -> None:
            with scaled_branches(layer, layer.mod_plan.branch_ends, weight):
                run_kept(self.forward, layer, self.form, router.gate, router.keep, x_B1D, args, kwargs)

        self.run_if_kept(layer, body)
        return layer.joined(x_B1D, (None,) * layer.mod_plan.extra_outputs)


class SublayerStep(RoutedStep):
    """The whole layer runs; in the middle of it one sublayer follows the decision."""

    def __init__(self, layer: Any, index: int, step: StepPass) -> None:
        super().__init__(layer, index, step)
        self.sublayer: Any = layer.get_submodule(self.name_in(layer) or "")

    @staticmethod
    def name_in(layer: nn.Module) -> str | None:
        """The sublayer's name in its layer."""
        raise NotImplementedError

    def forwards(self) -> dict[nn.Module, Forward]:
        return super().forwards() | {self.sublayer: self.run_sublayer}

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        self.decide(args, kwargs, self.step.graph)
        return self.step.around(self.forward)(self.layer, *args, **kwargs)

    def run_sublayer(self, *args: Any, **kwargs: Any) -> Any:
        """The sublayer's forward, once the layer has decided."""
        sublayer, router, run_kept = self.sublayer, self.router, self.step.run_kept
        out_B1D = torch.zeros_like(LayerArguments(sublayer.dense_class, args, kwargs).hidden)
        forward = sublayer.dense_class.forward

        def body() -> None:
            run_kept(forward, sublayer, self.form, router.gate, router.keep, out_B1D, args, kwargs)

        self.run_if_kept(sublayer, body)
        return sublayer.joined(out_B1D, (None,) * sublayer.mod_plan.extra_outputs)


class AttentionStep(SublayerStep):
    """The layer's attention runs if any row keeps its token."""

    gated = "attention"
    name_in = staticmethod(attention_name)


class MLPStep(SublayerStep):
    """The layer's MLP runs if any row keeps its token."""

    gated = "mlp"
    name_in = staticmethod(mlp_name)


class KeptKeysStep(RoutedStep):
    """The whole layer runs; its attention finds in its tables whose new token is kept."""

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        with aside(self.router.keep.device):  # attention asks when it has read all keys
            self.decide(args, kwargs, None)  # no IF node follows
        return super().run_layer(*args, **kwargs)


def _run(forward: Forward, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(layer, *args, **kwargs)


def _run_kept(
    forward: Forward,
    module: nn.Module,
    form: str,
    gate_B: Tensor,
    keep_B: Tensor,
    out_B1D: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Runs a layer or sublayer and writes the rows that keep into `out_B1D`, which holds what a skipped token
    is: a layer's input, a sublayer's zeros.
    """
    output = forward(module, *args, **kwargs)
    y = output[0] if isinstance(output, tuple) else output
    y = gated_output(form, y, out_B1D, gate_B[:, None], False)
    out_B1D.copy_(torch.where(keep_B[:, None, None], y, out_B1D))
