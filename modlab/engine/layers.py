"""How a layer runs inside the engine: prefill packs the kept tokens of all rows, decoding branches on the
GPU.

The family's own forward of model and layers stays in charge. For the length of one call each decoder layer
lends its `forward` (an attribute of that object) to a function from here, which calls the layer's own code.

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

from modlab.anatomy import attention_name, mlp_name
from modlab.arguments import LayerArguments
from modlab.engine.attention import PrefillSlot
from modlab.engine.branch import Branch
from modlab.engine.tables import RouterSlot, Tables
from modlab.layer import CALL, RoutedLayer
from modlab.ops.combine import gated_output, scaled_branches
from modlab.ops.decode_router import RouterCall
from modlab.ops.router_logits import router_logits
from modlab.routing import Routing

Forward = Callable[..., Any]

MLP_CHUNK = 16384
"""Tokens that an MLP takes at once in prefill: its inner activations, 3.5 times as wide, set the peak."""


@contextlib.contextmanager
def lent(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Inside this block each module's `forward` is the given function."""
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
        for module, forward in own.items():
            module.__dict__["forward"] = forward


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
    """How gates enter outputs, in the terms of `ops.combine`."""
    return "scaled" if routing.config.gate == "paper" else routing.config.gate


# ---- prefill ----


def prefill_forwards(
    layers: list[nn.Module], routing: Routing | None, slots_L: list[PrefillSlot], last: Tensor
) -> dict[nn.Module, Forward]:
    """What the layers and their MLPs run in a prefill.

    Args:
        slots_L: each layer's slot; a routed layer's is filled in when it has decided.
        last: last position of each row in the line, long [B].
    """
    forwards: dict[nn.Module, Forward] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, RoutedLayer):
            assert routing is not None
            forwards[layer] = partial(_prefill_routed, index, layer, routing, slots_L[index], last)
        name = mlp_name(layer)
        if name is not None:
            mlp = layer.get_submodule(name)
            forwards[mlp] = partial(_chunked, mlp.forward)
    return forwards


def _prefill_routed(
    index: int,
    layer: RoutedLayer,
    routing: Routing,
    slot: PrefillSlot,
    last: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Packs the kept tokens of all rows and runs the layer on them; the others are not touched."""
    kwargs.pop(CALL, None)
    arguments = LayerArguments(layer.dense_class, args, kwargs)
    x = arguments.hidden
    logits = partial(router_logits, layer.mod_router)
    decision = routing.decide(index, logits, arguments.residual_BTD, training=False)
    keep_S = decision.keep[0]
    passed_B = keep_S.cumsum(0)[last]
    passed = passed_B.tolist()  # the one host sync of the layer
    slot.counts = [b - a for a, b in zip([0, *passed], passed, strict=False)]
    kept = passed[-1]
    if kept == 0:
        slot.cache.lengths, slot.columns = [0] * len(passed), slot.columns[:0]
        return layer.joined(x, (None,) * layer.mod_extra_outputs)
    slot.varying = kept < x.shape[1]
    if not slot.varying:
        changes: dict[str, Any] = {}
        gate_1S = decision.gate
    else:
        kept_S = torch.nonzero_static(keep_S, size=kept)[:, 0]
        slot.columns = slot.columns[kept_S]
        changes = arguments.select(torch.zeros(1, 1, dtype=torch.long, device=x.device), kept_S[None])
        gate_1S = decision.gate[:, kept_S]
    slot.bounds = F.pad(passed_B, (1, 0)).int()  # small, and by now the GPU has large tensors to gather
    form = gate_form(routing)
    with scaled_branches(layer, layer.mod_branch_ends, gate_1S if form == "scaled" else None):
        output = arguments.call(partial(layer.dense_class.forward, layer), changes)
    y, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
    y = gated_output(form, y, changes.get(arguments.hidden_name, x), gate_1S, False)
    out = x.index_copy_(1, kept_S, y.to(x.dtype)) if slot.varying else y
    return layer.joined(out, tuple(None for _ in rest))


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
    """What the layers run in one decoding step.

    Args:
        branch: how a routed layer is skipped.
        graph: the CUDA graph being captured, or None.
        compiled: makes a function fast, or returns it as it is.
    """
    run_dense, run_kept = compiled(_run), compiled(_run_kept)
    forwards: dict[nn.Module, Forward] = {}
    for index, layer in enumerate(layers):
        forward = dense_forward(layer)
        if not isinstance(layer, RoutedLayer):
            forwards[layer] = partial(run_dense, forward, layer)
            continue
        assert routing is not None
        form = gate_form(routing)
        # Hooks put the paper's gate inside the layer, and hooks are not compiled.
        body = _run_kept if form == "scaled" else run_kept
        slot = tables.routers[index]
        forwards[layer] = partial(
            _decode_routed, layer, forward, body, form, routing, slot, tables, branch, graph, index
        )
    return forwards


def _run(forward: Forward, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(layer, *args, **kwargs)


def _run_kept(
    forward: Forward,
    layer: nn.Module,
    form: str,
    gate_B: Tensor,
    keep_B: Tensor,
    x_B1D: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Runs the layer and writes the rows that keep into its input `x_B1D`."""
    output = forward(layer, *args, **kwargs)
    y = output[0] if isinstance(output, tuple) else output
    y = gated_output(form, y, x_B1D, gate_B[:, None], False)
    x_B1D.copy_(torch.where(keep_B[:, None, None], y, x_B1D))


def _decode_routed(
    layer: RoutedLayer,
    forward: Forward,
    run_kept: Forward,
    form: str,
    routing: Routing,
    slot: RouterSlot,
    tables: Tables,
    branch: Branch,
    graph: Any,
    index: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    kwargs.pop(CALL, None)
    arguments = LayerArguments(layer.dense_class, args, kwargs)
    x_B1D = arguments.hidden
    call = RouterCall(
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

    def body() -> None:
        weight = slot.gate[:, None] if form == "scaled" else None
        with scaled_branches(layer, layer.mod_branch_ends, weight):
            run_kept(forward, layer, form, slot.gate, slot.keep, x_B1D, args, kwargs)

    branch.route(graph, call, body)
    return layer.joined(x_B1D, (None,) * layer.mod_extra_outputs)
