"""Prompt tokens leave early, and routers decide whose keys and values stay (`skip="kv+prompt"`).

Below the point of leaving this is `skip="kv"`. Above it keys and values come from the state there, as in
`leaving.py`, and so do the routers' decisions about them: both are known of a token that has left. What is
attended to is `skip="kv"`'s in all layers, so execution is too (`packed.py`, `masked_keys.py`), with an
attention whose twin reads queries off one state, keys and values off the other.

A prompt of which only the last token's output is asked for is written in one piece; its last token then
attends to what it would have attended to among all, before anything is swept out.

Shape letters: B rows, T tokens in, R rows of one group, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modlab.errors import ModlabError
from modlab.execution.given_keys import (
    ReadingView,
    States,
    View,
    Written,
    reading,
    trained_projections,
    twin,
    write,
    writing,
)
from modlab.execution.leaving import LeavingLayer
from modlab.execution.packed import attention_kernels, run_packed
from modlab.execution.projections import Projections
from modlab.execution.routed import RoutedKeys, RoutedLayer, RoutedModule
from modlab.execution.stored_keys import StoredView
from modlab.hf.arguments import LayerArguments
from modlab.routing.record import Decision, ForwardCall
from modlab.routing.state import eager

SOURCE = "mod_source"
"""Name under which an attention module is handed what its keys and values are projected from."""


class ListeningView(View):
    """Ends a layer where its attention begins: what that would have been given is wanted."""

    heard: Tensor | None = None


class PromptView(View):
    """Has the attention write the keys and values of all tokens, and lets each row's last one read them.

    Args:
        trained: the layer's projections.
        cache: the cache itself.
        read: called with the rows of a group, once all of theirs is written: the rows, keys and values, and
            the mask of their last tokens.
    """

    def __init__(
        self, trained: Projections, cache: Any, read: Callable[[list[int], States, Any], None]
    ) -> None:
        super().__init__({}, cache)
        self.trained, self.read = trained, read


class ProjectedKeys(RoutedKeys):
    """An attention module whose keys stay or not; above the point of leaving they come from the state
    there."""

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.mod_plan
        routing = plan.routing
        if routing.is_off or plan.layer_idx < routing.first_left:
            return super().forward(*args, **kwargs)
        call = routing.require_call()
        view = next((v for v in (*args, *kwargs.values()) if isinstance(v, View)), None)
        arguments = LayerArguments(self.dense_class, args, kwargs)
        if isinstance(view, ListeningView):
            view.heard = arguments.hidden
            raise Written
        if isinstance(view, PromptView):
            self._write_prompt(view, args, kwargs)
            raise Written
        if isinstance(view, ReadingView):
            call.ran.add((plan.layer_idx, plan.part))
            dense_class: Any = self.dense_class
            return dense_class.forward(twin(self, view.projections), *args, **kwargs)
        source = {SOURCE: call.sources[plan.layer_idx][0]}
        arguments = LayerArguments(self.dense_class, args, {**kwargs, **source})
        return self.run_decided(arguments, call.decisions[plan.layer_idx])

    def dense_forward(self) -> Callable[..., Any]:
        plan = self.mod_plan
        if plan.routing.is_off or plan.layer_idx < plan.routing.first_left:
            return super().dense_forward()
        dense_class: Any = self.dense_class

        def forward(*args: Any, **kwargs: Any) -> Any:
            source = kwargs.pop(SOURCE)
            trained = trained_projections(self, plan.routing.require_call().sources[plan.layer_idx][1])
            keys = {name: _of(trained[name], source) for name in ("k_proj", "v_proj")}
            return dense_class.forward(twin(self, trained | keys), *args, **kwargs)

        return forward

    def _write_prompt(self, view: PromptView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Stores what is to be stored of all tokens, no query is computed; then the last ones read."""
        plan = self.mod_plan
        dense_class: Any = self.dense_class
        args = tuple(view.cache if value is view else value for value in args)
        kwargs = {name: view.cache if value is view else value for name, value in kwargs.items()}
        arguments = LayerArguments(dense_class, args, kwargs)
        name, mask_name = arguments.cache_name(), arguments.mask_name()
        assert name is not None

        def write_rows(*args: Any, **kwargs: Any) -> Any:
            given = LayerArguments(dense_class, args, kwargs)
            rows = given.cache()
            inner = writing(self, view.trained, rows)
            other = twin(self, inner.projections)

            def run() -> None:
                given.call(lambda *a, **k: dense_class.forward(other, *a, **k), {name: inner})

            states = write(inner, run, plan.layer_idx)
            if isinstance(rows, StoredView):  # attends to what lies in the cache, and is given a token's own
                states = (states[0][:, :, -1:], states[1][:, :, -1:])
            mask = given.mask() if mask_name else None
            last = mask[:, :, -1:] if isinstance(mask, Tensor) and mask.dim() == 4 else mask
            view.read(rows.rows, states, last)
            nothing = torch.zeros_like(given.hidden)
            rest = (None,) * plan.extra_outputs
            return (nothing, *rest) if rest or plan.in_tuple else nothing

        decision = plan.routing.require_call().decisions[plan.layer_idx]
        run_packed(self, write_rows, arguments, plan.site(decision, last_alone=True))


class LeavingKeysLayer(LeavingLayer):
    """A decoder layer whose attention is a `ProjectedKeys`."""

    def router_logits(self, x_BTD: Tensor) -> Tensor:
        """The router's, of the state that keys and values come from."""
        above = self.mod_plan.layer_idx >= self.mod_plan.routing.first_left
        return RoutedLayer.router_logits(self, self.entered(x_BTD) if above else x_BTD)

    def dense_forward(self) -> Callable[..., Any]:
        """Compiled at most below the point of leaving."""
        plan = self.mod_plan
        below = plan.layer_idx < plan.routing.first_left
        return RoutedModule.dense_forward(self) if below else super().dense_forward()

    def run_layer(
        self, arguments: LayerArguments, decision: Decision, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plan = self.mod_plan
        call = plan.routing.require_call()
        call.ran.add((plan.layer_idx, "layer"))
        if plan.layer_idx < plan.routing.first_left:
            return self.dense_forward()(*args, **kwargs)
        if not self.runs_masked() and arguments.cache() is not None and _last_alone(call):
            return self._leave(arguments)
        view = ListeningView({}, None)
        self._pass(arguments, view)
        if view.heard is None:
            raise ModlabError(f"layer {plan.layer_idx} does not hand its cache to its attention.")
        call.sources[plan.layer_idx] = (view.heard, self.mod_projections)
        out, rest = arguments.run(self.dense_forward(), {})
        return self.joined(arguments.as_given(out), rest, arguments.in_tuple)

    def _pass(self, arguments: LayerArguments, view: View) -> None:
        """The layer on the state where tokens leave, up to its attention."""
        changes = {
            arguments.hidden_name: self.entered(arguments.hidden),
            self._cache_name(arguments): view,
        }
        with contextlib.suppress(Written):
            arguments.run(self.dense_forward(), changes)

    def _leave(self, arguments: LayerArguments) -> Any:
        """Writes the prompt's keys and values; each row's last token runs the layer, the others pass by."""
        plan, x, cache = self.mod_plan, arguments.hidden, arguments.cache()
        out, extra = x.clone(), (None,) * plan.extra_outputs

        def read(rows: list[int], states: States, mask: Any) -> None:
            nonlocal extra
            rows_R1 = torch.tensor(rows, device=x.device)[:, None]
            last_R1 = torch.full_like(rows_R1, arguments.time - 1)
            view = reading(self._attention(), self.mod_projections, cache, states)
            changes = arguments.select(rows_R1, last_R1) | {self._cache_name(arguments): view}
            if (mask_name := arguments.mask_name()) is not None:
                changes[mask_name] = mask
            with attention_kernels(x):
                y_R1D, rest = arguments.run(self.dense_forward(), changes)
            out[rows_R1, last_R1] = y_R1D.to(out.dtype)
            extra = (None,) * len(rest)

        self._pass(arguments, PromptView(self.mod_projections, cache, read))
        return self.joined(arguments.as_given(out), extra, arguments.in_tuple)

    def _attention(self) -> ProjectedKeys:
        return next(module for module in self.modules() if isinstance(module, ProjectedKeys))


def _of(projection: Callable[[Tensor], Tensor], source_BTD: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: projection(source_BTD)


def _last_alone(call: ForwardCall) -> bool:
    """Whether the output of the last column alone is asked for, and that is a token in every row (one host
    sync)."""
    if call.asked is None:
        return False
    alone = call.asked[-1] & (call.asked.sum() == 1) & call.real[:, -1].all()
    return bool(alone)
