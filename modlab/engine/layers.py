"""How a layer runs inside the engine: prefill packs the kept tokens of all rows, decoding branches on the
GPU.

The family's own forward of model and layers stays in charge. For the length of one call each decoder layer
runs a function from here (see `lending`), which calls the layer's own code. Where routers leave out a layer's
attention or MLP alone, the layer decides at its entrance, and that submodule follows the decision.

Shape letters: S tokens of all rows in one line, B rows, T = 1 token in, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modlab.engine.attention import CannotCapture, PrefillSlot
from modlab.engine.branch import Branch
from modlab.engine.tables import RouterSlot, Tables
from modlab.execution.gate import gated_output, scaled_branches
from modlab.execution.routed import CALL, RoutedLayer, RoutedModule
from modlab.hf.anatomy import attention_name, mlp_name
from modlab.hf.arguments import LayerArguments
from modlab.kernels.decode_router import RouterCall
from modlab.kernels.router_logits import router_logits
from modlab.routing.record import Decision
from modlab.routing.state import Routing

Forward = Callable[..., Any]

MLP_CHUNK = 16384
"""Tokens that an MLP takes at once in prefill: its inner activations, 3.5 times as wide, set the peak."""


@contextlib.contextmanager
def slots(attention: list[list[nn.Module]], name: str, values: list[Any]) -> Iterator[None]:
    """Inside this block every module of layer i's attention has the attribute `name` with value i."""
    try:
        for modules, value in zip(attention, values, strict=True):
            for module in modules:
                module.__dict__[name] = value
        yield
    finally:
        for modules in attention:
            for module in modules:
                module.__dict__.pop(name, None)


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The layer's attention with its submodules, any of which may be what calls the attention function."""
    return list(layer.get_submodule(attention_name(layer) or "").modules())


def dense_forward(layer: nn.Module) -> Forward:
    """The forward that the family wrote, as a function of (layer, ...)."""
    return layer.dense_class.forward if isinstance(layer, RoutedLayer) else type(layer).forward


def gate_form(routing: Routing) -> str:
    """How gates enter outputs, in the terms of `ops.combine`; the paper's in one branch needs no hooks."""
    if routing.config.gate != "paper":
        return routing.config.gate
    return "scaled" if routing.config.skip == "layer" else "fused"


def routed_sublayer(layer: RoutedLayer, routing: Routing) -> RoutedModule | None:
    """The attention or MLP that the layer's router decides for, or None where it is the layer, or the cache
    alone.
    """
    if routing.config.skip in ("layer", "kv"):
        return None
    name = attention_name(layer) if routing.config.skip == "attention" else mlp_name(layer)
    sublayer: Any = layer.get_submodule(name or "")
    return sublayer


# ---- prefill ----


def prefill_forwards(
    layers: list[nn.Module], routing: Routing | None, slots_L: list[PrefillSlot], last: Tensor
) -> dict[nn.Module, Forward]:
    """What the layers, their MLPs and routed attentions run in a prefill.

    Args:
        slots_L: each layer's slot; a routed layer's is filled in when it has decided.
        last: last position of each row in the line, long [B].
    """
    forwards: dict[nn.Module, Forward] = {}
    for index, layer in enumerate(layers):
        name = mlp_name(layer)
        if name is not None:
            mlp = layer.get_submodule(name)
            forwards[mlp] = partial(_chunked, _own_forward(mlp))
        if not isinstance(layer, RoutedLayer):
            continue
        assert routing is not None
        sublayer = routed_sublayer(layer, routing)
        forwards[layer] = partial(_prefill_routed, index, layer, routing, slots_L[index], last)
        if sublayer is not None:
            run = forwards.get(sublayer, _own_forward(sublayer))
            slot = slots_L[index] if routing.config.skip == "attention" else None
            forwards[sublayer] = partial(_prefill_sublayer, index, sublayer, run, routing, slot, last)
    return forwards


def _own_forward(module: nn.Module) -> Forward:
    """The forward that `module` would have without a router."""
    return partial(module.dense_class.forward, module) if isinstance(module, RoutedModule) else module.forward


def _prefill_routed(
    index: int,
    layer: RoutedLayer,
    routing: Routing,
    slot: PrefillSlot,
    last: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Decides; then runs the layer on the kept tokens, or lets its sublayer follow the decision."""
    kwargs.pop(CALL, None)
    arguments = LayerArguments(layer.dense_class, args, kwargs)
    logits = partial(router_logits, layer.mod_router)
    decision = routing.decide(index, logits, arguments.residual_BTD, training=False)
    forward = partial(layer.dense_class.forward, layer)
    if routing.config.skip == "kv":
        slot.keep = decision.keep[0]
    if routing.config.skip != "layer":
        return forward(*args, **kwargs)
    form = gate_form(routing)
    return _prefill_kept(layer, forward, arguments, decision, slot, last, form, residual=True)


def _prefill_sublayer(
    index: int,
    sublayer: RoutedModule,
    forward: Forward,
    routing: Routing,
    slot: PrefillSlot | None,
    last: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    arguments = LayerArguments(sublayer.dense_class, args, kwargs)
    decision, form = routing.require_call().decisions[index], gate_form(routing)
    return _prefill_kept(sublayer, forward, arguments, decision, slot, last, form, residual=False)


def _prefill_kept(
    module: RoutedModule,
    forward: Forward,
    arguments: LayerArguments,
    decision: Decision,
    slot: PrefillSlot | None,
    last: Tensor,
    form: str,
    residual: bool,
) -> Any:
    """Packs the kept tokens of all rows and runs the module on them; the others are not touched.

    Args:
        slot: of the attention inside the module; None if there is none.
        residual: True if a skipped token passes through (a layer), False if it becomes zero (a sublayer).
    """
    x = arguments.hidden
    keep_S = decision.keep[0]
    passed_B = keep_S.cumsum(0)[last]
    passed = passed_B.tolist()  # the one host sync of the layer
    kept = passed[-1]
    varying = kept < x.shape[1]
    changes: dict[str, Any] = {}
    gate_1S = decision.gate
    if kept and varying:
        kept_S = torch.nonzero_static(keep_S, size=kept)[:, 0]
        changes = arguments.select(torch.zeros(1, 1, dtype=torch.long, device=x.device), kept_S[None])
        gate_1S = decision.gate[:, kept_S]
    if slot is not None:
        slot.counts = [b - a for a, b in zip([0, *passed], passed, strict=False)]
        slot.varying = varying
        slot.bounds = F.pad(passed_B, (1, 0)).int()  # small, and by now the GPU has large tensors to gather
        if kept == 0:
            slot.cache.lengths, slot.columns = slot.counts, slot.columns[:0]
        elif varying:
            slot.columns = slot.columns[kept_S]
    if kept == 0:
        out = x if residual else torch.zeros_like(x)
        return module.joined(out, (None,) * module.mod_plan.extra_outputs)
    with scaled_branches(module, module.mod_plan.branch_ends, gate_1S if form == "scaled" else None):
        y, rest = arguments.run(forward, changes)
    skipped = changes.get(arguments.hidden_name, x) if residual else 0.0
    y = gated_output(form, y, skipped, gate_1S, False)
    if varying:
        out = x if residual else torch.zeros_like(x)
        y = out.index_copy_(1, kept_S, y.to(x.dtype))
    return module.joined(y, tuple(None for _ in rest), arguments.in_tuple)


def _chunked(forward: Forward, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An MLP in pieces of `MLP_CHUNK` tokens; exact, as no token of it looks at another."""
    if x_BTD.dim() != 3 or x_BTD.shape[1] <= MLP_CHUNK or args or kwargs:
        return forward(x_BTD, *args, **kwargs)
    out = None
    for first in range(0, x_BTD.shape[1], MLP_CHUNK):
        piece = forward(x_BTD[:, first : first + MLP_CHUNK])
        if not isinstance(piece, Tensor):
            return forward(x_BTD)
        if out is None:
            out = piece.new_empty(*x_BTD.shape[:2], piece.shape[2])
        out[:, first : first + MLP_CHUNK] = piece
    return out


# ---- decoding ----


def decode_forwards(
    layers: list[nn.Module],
    routing: Routing | None,
    tables: Tables,
    branch: Branch,
    graph: Any,
    compiled: Callable[[Forward], Forward],
) -> dict[nn.Module, Forward]:
    """What the layers and their routed sublayers run in one decoding step.

    Args:
        branch: how a routed layer is skipped.
        graph: the CUDA graph being captured, or None.
        compiled: makes a function fast, or returns it as it is.
    """
    run_dense, run_kept = compiled(_run), compiled(_run_kept)
    around: dict[Forward, Forward] = {}  # layers that a routed sublayer cuts in two, compiled
    decided: dict[int, Any] = {}
    forwards: dict[nn.Module, Forward] = {}
    for index, layer in enumerate(layers):
        forward = dense_forward(layer)
        if not isinstance(layer, RoutedLayer):
            forwards[layer] = partial(run_dense, forward, layer)
            continue
        assert routing is not None
        form, sublayer = gate_form(routing), routed_sublayer(layer, routing)
        if routing.config.skip == "kv":
            keeping = partial(run_dense, forward)
            forwards[layer] = partial(_decode_keeping, layer, keeping, routing, tables, branch, index)
            continue
        if sublayer is not None:
            if forward not in around:
                around[forward] = compiled(forward)
            run, slot = around[forward], tables.routers[index]
            forwards[layer] = partial(
                _decode_deciding, layer, run, routing, tables, branch, graph, index, decided
            )
            forwards[sublayer] = partial(
                _decode_sublayer, sublayer, run_kept, form, slot, branch, graph, index, decided
            )
            continue
        # Hooks put the paper's gate inside the layer, and hooks are not compiled.
        body = _run_kept if form == "scaled" else run_kept
        forwards[layer] = partial(
            _decode_routed, layer, forward, body, form, routing, tables, branch, graph, index
        )
    return forwards


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


def _decode_routed(
    layer: RoutedLayer,
    forward: Forward,
    run_kept: Forward,
    form: str,
    routing: Routing,
    tables: Tables,
    branch: Branch,
    graph: Any,
    index: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    kwargs.pop(CALL, None)
    arguments = LayerArguments(layer.dense_class, args, kwargs)
    x_B1D, slot = arguments.hidden, tables.routers[index]

    def body() -> None:
        weight = slot.gate[:, None] if form == "scaled" else None
        with scaled_branches(layer, layer.mod_plan.branch_ends, weight):
            run_kept(forward, layer, form, slot.gate, slot.keep, x_B1D, args, kwargs)

    decided = branch.decide(graph, _router_call(layer, arguments, routing, tables, index))
    branch.run_decided(graph, decided, body)
    return layer.joined(x_B1D, (None,) * layer.mod_plan.extra_outputs)


def _decode_keeping(
    layer: RoutedLayer,
    run: Forward,
    routing: Routing,
    tables: Tables,
    branch: Branch,
    index: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs the whole layer; its attention finds in its slot whose new token is kept."""
    kwargs.pop(CALL, None)
    arguments = LayerArguments(layer.dense_class, args, kwargs)
    branch.decide(None, _router_call(layer, arguments, routing, tables, index))  # no IF node follows
    return run(layer, *args, **kwargs)


def _decode_deciding(
    layer: RoutedLayer,
    run: Forward,
    routing: Routing,
    tables: Tables,
    branch: Branch,
    graph: Any,
    index: int,
    decided: dict[int, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs the whole layer; its sublayer, in the middle of it, finds the decision in `decided`."""
    kwargs.pop(CALL, None)
    arguments = LayerArguments(layer.dense_class, args, kwargs)
    decided[index] = branch.decide(graph, _router_call(layer, arguments, routing, tables, index))
    return run(layer, *args, **kwargs)


def _decode_sublayer(
    sublayer: RoutedModule,
    run_kept: Forward,
    form: str,
    slot: RouterSlot,
    branch: Branch,
    graph: Any,
    index: int,
    decided: dict[int, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if index not in decided:  # an IF node takes its condition once
        raise CannotCapture(f"its layers run their {type(sublayer).__name__} more than once a step")
    arguments = LayerArguments(sublayer.dense_class, args, kwargs)
    out_B1D = torch.zeros_like(arguments.hidden)

    def body() -> None:
        run_kept(sublayer.dense_class.forward, sublayer, form, slot.gate, slot.keep, out_B1D, args, kwargs)

    branch.run_decided(graph, decided.pop(index), body)
    return sublayer.joined(out_B1D, (None,) * sublayer.mod_plan.extra_outputs)


def _router_call(
    layer: RoutedLayer, arguments: LayerArguments, routing: Routing, tables: Tables, index: int
) -> RouterCall:
    slot = tables.routers[index]
    return RouterCall(
        x_BD=arguments.residual_BTD[:, 0],
        weight_D=layer.mod_router.weight,
        bias_1=layer.mod_router.bias,
        threshold_1=slot.threshold,
        position_B=tables.position[:, 0],
        keep_first=routing.config.keep_first,
        forced_BP=tables.forced.get(index),
        forced_2=slot.forced,
        gate_B=slot.gate,
        keep_B=slot.keep,
        any_1=slot.any,
    )
