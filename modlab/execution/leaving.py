"""Upper layers of a model whose prompt tokens leave early (`skip="prompt"`).

In these layers the keys and values of *every* token are projected from the state with which it entered the
first of them. So what a token does above is nobody's business but its own: a token whose output nobody asks
for leaves there, and the others compute what they would have computed, to the last rounding. A layer runs in
two passes:

1. writing: keys and values of all tokens, from that state, into the cache; the layer stops there.
2. reading: the tokens that go on (all of them in decoding, in training and where all logits are asked for)
   attend to what was written, with trained queries, and pass the layer in full.

Both passes are the dense layer's own forward. Its attention runs as a twin: an object with the same weights,
whose projections are replaced. Which ones the pass says, in the view that stands where the cache was.

Shape letters: B rows, T tokens in, S tokens that go on (of the row that has the most), K keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from modlab.errors import ModlabError
from modlab.execution.gate import over
from modlab.execution.masks import as_attention_mask, packed_mask
from modlab.execution.packed import attention_kernels, kept_first
from modlab.execution.projections import Projections, why_not_copied
from modlab.execution.routed import RoutedLayer, RoutedModule
from modlab.hf.arguments import LayerArguments, forward_signature
from modlab.hf.names import CACHE_ARGUMENTS
from modlab.routing.record import Decision, ForwardCall
from modlab.routing.state import eager

States = tuple[Tensor, Tensor]
"""Keys and values, as a layer's attention hands them to its cache and gets them back."""

Projection = Callable[[Tensor], Tensor]

SURE = 8.0
"""Logit of a token that goes on; of one that leaves it is the negative."""


class Written(Exception):
    """Raised once keys and values are written: the rest of the layer is not wanted."""


class View(Cache):
    """Stands where the cache was, in one pass of one layer.

    Args:
        projections: by name: what the attention module calls instead of its own.
        cache: the cache itself, or None in a forward without one.
    """

    def __init__(self, projections: dict[str, Projection], cache: Any) -> None:
        super().__init__(layers=[] if cache is None else cache.layers)
        self.projections = projections
        self.cache = cache


class WritingView(View):
    """Takes the keys and values of all tokens, and ends the pass."""

    states: States | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Stores them; never returns."""
        states = (key_states, value_states)
        self.states = states if self.cache is None else self.cache.update(*states, layer_idx, *args, **kwargs)
        raise Written


class ReadingView(View):
    """Answers with what was written, whatever it is given."""

    def __init__(self, projections: dict[str, Projection], cache: Any, states: States) -> None:
        super().__init__(projections, cache)
        self.states = states

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """All keys and values, cached ones included."""
        return self.states


def writing(attention: nn.Module, trained: Projections | None, cache: Any) -> WritingView:
    """The view of a writing pass: no query is computed. Without `trained` the module's own projections."""
    return WritingView(
        {"q_proj": _nothing(attention, "q_proj"), **_called(attention, trained, ("k_proj", "v_proj"))}, cache
    )


def reading(attention: nn.Module, trained: Projections | None, cache: Any, states: States) -> ReadingView:
    """The view of a reading pass: neither key nor value is computed."""
    nothing = {name: _nothing(attention, name) for name in ("k_proj", "v_proj")}
    return ReadingView({**nothing, **_called(attention, trained, ("q_proj",))}, cache, states)


def _called(
    attention: nn.Module, trained: Projections | None, names: tuple[str, ...]
) -> dict[str, Projection]:
    def projection(name: str) -> Projection:
        own = attention.get_submodule(name)
        if trained is None:
            return own
        one = trained.get_submodule(name)
        return lambda x: one(x, own)

    return {name: projection(name) for name in names}


def _nothing(attention: nn.Module, name: str) -> Projection:
    """A projection that costs nothing: zeros of its width, which nobody looks at."""
    width: int = attention.get_submodule(name).out_features  # type: ignore[assignment]
    return lambda x: x.new_zeros(()).expand(*x.shape[:-1], width)


def twin(attention: nn.Module, view: View) -> nn.Module:
    """An object with the module's weights and submodules, whose projections are the view's. The module itself
    stays as it is: another thread may run it."""
    dense_class: Any = getattr(attention, "dense_class", type(attention))
    other: nn.Module = object.__new__(dense_class)
    other.__dict__.update(attention.__dict__)
    other.__dict__.update(view.projections)
    return other


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
        return dense_class.forward(twin(self, view), *args, **kwargs)


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
        first = plan.routing.layers[0]
        if plan.layer_idx == first:
            call.entered[first] = arguments.hidden
        entered = call.entered[first].to(arguments.hidden.device)
        states = self._written(arguments, entered)
        everybody = call.asked is None and call.override is None
        index_BS = None if everybody or self.runs_masked() else _going_on(decision.keep)
        if index_BS is None or not _can_gather(arguments, index_BS, plan.routing.attention):
            out, rest = arguments.run(self.dense_forward(), self._reading(arguments, states))
            if not everybody:
                out = torch.where(over(decision.keep, out), out, arguments.hidden)
        else:
            out, rest = self._run_some(arguments, decision.keep, index_BS, states, call)
        return self.joined(arguments.as_given(out), rest, arguments.in_tuple)

    def runs_masked(self) -> bool:
        """In training too: everybody's loss is wanted."""
        return self.training or self.mod_plan.routing.require_call().masked

    def _written(self, arguments: LayerArguments, entered_BTD: Tensor) -> States:
        """Keys and values of all tokens, cached ones included; the cache holds them from here on."""
        attention, cache = self._attention(), arguments.cache()
        view = writing(attention, self.mod_projections, cache)
        changes = {arguments.hidden_name: entered_BTD, self._cache_name(arguments): view}
        with contextlib.suppress(Written):
            arguments.run(self.dense_forward(), changes)
        if view.states is None:
            raise ModlabError(
                f"the attention of layer {self.mod_plan.layer_idx} did not write to the cache it was given."
            )
        return view.states

    def _reading(self, arguments: LayerArguments, states: States) -> dict[str, Any]:
        view = reading(self._attention(), self.mod_projections, arguments.cache(), states)
        return {self._cache_name(arguments): view}

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
        rows_B1 = torch.arange(len(x), device=x.device)[:, None]
        changes = arguments.select(rows_B1, index_BS) | self._reading(arguments, states)
        mask_name = arguments.mask_name()
        if mask_name is not None:
            mask = arguments.mask()
            attention = self.mod_plan.routing.attention
            changes[mask_name] = _rows_of(mask, index_BS, states[0].shape[-2], call, attention, x.dtype)
        with attention_kernels(x):
            y_BSD, rest = arguments.run(self.dense_forward(), changes)
        where = (rows_B1.expand_as(index_BS), index_BS)
        # A row with fewer tokens than the others has some in their place that leave all the same.
        y_BSD = torch.where(over(keep_BT[where], y_BSD), y_BSD, changes[arguments.hidden_name])
        out = x.clone()
        out.index_put_(where, y_BSD.to(out.dtype))
        return out, tuple(None for _ in rest)

    def _attention(self) -> nn.Module:
        return next(module for module in self.modules() if isinstance(module, ProjectedAttention))

    def _cache_name(self, arguments: LayerArguments) -> str:
        name = arguments.cache_name() or cache_name(self.dense_class, self._attention())
        assert name is not None, "convert refuses a layer without"
        return name


def cache_name(layer_class: Any, attention: nn.Module) -> str | None:
    """The name under which a layer takes its cache, or hands it on to its attention; None if it has none."""
    attention_class: Any = getattr(attention, "dense_class", type(attention))
    for module_class in (layer_class, attention_class):
        names = forward_signature(module_class).parameters
        if found := next((name for name in CACHE_ARGUMENTS if name in names), None):
            return found
    return None


def _going_on(keep_BT: Tensor) -> Tensor | None:
    """Time positions [B, S] of the tokens that go on, each row's in order, filled up with others where a row
    has fewer; None where that is all tokens (one host sync)."""
    most = int(keep_BT.sum(1).max())
    return None if most == keep_BT.shape[1] else kept_first(keep_BT)[:, :most]


def _can_gather(arguments: LayerArguments, index_BS: Tensor, attention: str) -> bool:
    """Whether the tokens can run without the others: what has no axis for rows wants the same ones in every
    row, flash attention the latest ones."""
    flash = "flash" in attention
    if not index_BS.shape[1] or not (flash or arguments.one_row_each):
        return True
    if not flash:
        return bool((index_BS == index_BS[:1]).all())
    return not isinstance(arguments.mask(), Tensor) and _are_latest(index_BS, arguments.time)


def _are_latest(index_BS: Tensor, T: int) -> bool:
    """Whether they are the last tokens of the forward in every row (one host sync)."""
    S = index_BS.shape[1]
    return bool((index_BS == torch.arange(T - S, T, device=index_BS.device)).all())


def _rows_of(
    mask: Any, index_BS: Tensor, K: int, call: ForwardCall, attention: str, dtype: torch.dtype
) -> Any:
    """The model's own mask as these queries see it: [B, N or 1, S, K], or None where a kernel's own rule says
    the same."""
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask_BNTK = mask.expand(len(index_BS), -1, -1, -1)
        at = index_BS[:, None, :, None].expand(-1, mask_BNTK.shape[1], -1, mask_BNTK.shape[3])
        return mask_BNTK.gather(2, at)
    T, S = len(call.columns), index_BS.shape[1]
    if "flash" in attention or (S == 1 and _are_latest(index_BS, T)):
        return mask
    columns_K = torch.arange(call.num_columns - K, call.num_columns, device=index_BS.device)
    allowed = packed_mask(call.columns[index_BS], columns_K.expand(len(index_BS), -1))
    return as_attention_mask(allowed, attention, dtype)


def why_not_given_keys(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why an attention module cannot attend to keys and values that it is given; "" if it can. Both passes
    are tried with its own projections: they have to say what the module says.

    Args:
        attention: dense.
        args, kwargs: what its layer called it with, on a few tokens and without a cache.
    """
    if reason := why_not_copied(attention, rank=1):
        return reason
    arguments = LayerArguments(type(attention), args, kwargs)
    name = cache_name(type(attention), attention)
    if name is None:
        return "its attention takes no cache of keys and values"

    def run(view: View) -> Tensor:
        module: Any = twin(attention, view)
        return arguments.run(module.forward, {name: view})[0]

    try:
        wanted, _ = arguments.run(attention, {})
        writes = writing(attention, None, None)
        with contextlib.suppress(Written):
            run(writes)
        if writes.states is None:
            return "its attention does not write to its cache"
        found = run(reading(attention, None, None, writes.states))
    except Exception as problem:  # whatever it makes of projections that are no modules
        return f"its attention does not run on keys and values that it is given ({problem})"
    largest = wanted.abs().max().float()
    if not torch.allclose(found.float(), wanted.float(), rtol=0, atol=float(1e-3 * largest), equal_nan=True):
        return "its attention gives another result where it is given its keys and values"
    return ""
