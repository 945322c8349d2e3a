"""Layers that prompt tokens leave out, in a prefill: keys and values of all tokens, the layer for the last.

`execution/leaving.py` says what is computed. Here each of these layers runs twice: on the state with which
all tokens of the line entered the first of them, up to its attention, which stores keys and values and ends
the pass; then on each row's last token, which attends to what is stored as a decoding step does. The state of
the others is not carried on: above the point of leaving the line has B tokens.

Shape letters: S tokens of all rows in one line, B rows, N query heads, G kv heads, H head dim, D model dim, U
rows of a layer's cache (B, or B x G where each KV head has a gate).
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modlab.engine.attention import (
    CannotCapture,
    LayerPrefill,
    attend_step,
    encoded_line,
    hold_to_bound,
    store,
    store_kept_keys,
)
from modlab.engine.prefill_layers import Forward, KeptKeysPrefill, PrefillLine, RoutedPrefill
from modlab.engine.ring import RingBuffer
from modlab.engine.tables import LayerStep, addresses
from modlab.engine.transfer import sent
from modlab.execution.given_keys import Written, keys_alone, queries_alone, twin
from modlab.execution.projections import PROJECTIONS
from modlab.execution.routed import CALL
from modlab.hf.anatomy import attention_name
from modlab.hf.arguments import LayerArguments, hidden_name
from modlab.kernels.kept_attention import Stored


def on_state(
    module_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor
) -> LayerArguments:
    """A layer's arguments with another state for its hidden states."""
    if args:
        return LayerArguments(module_class, (state, *args[1:]), kwargs)
    return LayerArguments(module_class, (), {**kwargs, hidden_name(module_class): state})


class LeavingPrefill(RoutedPrefill):
    """A layer that prompt tokens leave out, all keys and values stored.

    Attributes:
        new: keys and values [B, G, H] of each row's last token, between the two passes.
        stored: how the buffer was laid out, where routing decides about it.
    """

    one_graph = False  # the first pass ends in the middle of it

    def __init__(self, layer: Any, index: int, part: LayerPrefill, line: PrefillLine) -> None:
        super().__init__(layer, index, part, line)
        self.attention: Any = layer.get_submodule(attention_name(layer) or "")
        self.trained = layer.get_submodule(PROJECTIONS)
        self.new: tuple[Tensor, Tensor] | None = None
        self.stored: Stored | None = None
        part.attend = self.attend
        line.left.append(self)

    def forwards(self) -> dict[nn.Module, Forward]:
        return super().forwards() | {self.attention: self.run_attention}

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        """Both passes; the output is that of each row's last token, [B, 1, D]."""
        kwargs.pop(CALL, None)
        layer_class, line = self.layer.dense_class, self.line
        hidden = LayerArguments(layer_class, args, kwargs).hidden
        if self.index == self.routing.first_left:
            line.entered, hidden = hidden, hidden[0, line.last][:, None]
        assert line.entered is not None, "the layers of a model run in their order"
        arguments = on_state(layer_class, args, kwargs, line.entered)
        self.decide_keys(arguments)
        forward = partial(layer_class.forward, self.layer)
        with contextlib.suppress(Written):
            arguments.run(forward, {})
        if self.new is None:
            raise CannotCapture(f"layer {self.index} did not come to the engine's attention function")
        last_B1 = line.last[:, None]
        changes = arguments.select(torch.zeros_like(last_B1), last_B1) | {arguments.hidden_name: hidden}
        y_B1D, rest = arguments.run(forward, changes)
        if self.new is not None:
            raise CannotCapture(f"the attention of layer {self.index} does not run for single tokens")
        return self.layer.joined(y_B1D, tuple(None for _ in rest), arguments.in_tuple)

    def decide_keys(self, arguments: LayerArguments) -> None:
        """Nothing to decide: all keys and values stay."""

    def run_attention(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's forward: keys and values of all tokens, then queries of the last ones."""
        which = keys_alone if self.new is None else queries_alone
        projections = which(self.attention, self.trained)
        if self.new is None and (width := getattr(self.attention, "head_dim", None)):
            narrow = projections | {"q_proj": lambda x: x.new_zeros(()).expand(*x.shape[:-1], width)}
            try:
                return self._run(narrow, args, kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a family that asks for all heads of a query
                if self.new is not None:  # not that: keys are being written already
                    raise
        return self._run(projections, args, kwargs)

    def _run(self, projections: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        other = twin(self.attention, projections)
        return self.attention.dense_class.forward(other, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Writes [1, G, S, H] and ends the pass; or attends, query [B, N, 1, H], output [B, 1, N, H]."""
        if self.new is None:
            part = self.part
            last_BGH = (x[0].index_select(1, self.line.last).transpose(0, 1) for x in (key, value))
            self.new = next(last_BGH), next(last_BGH)
            if part.kept is None:
                store(part, key[0], value[0])
            else:
                older, encoded = part.kept.older.read(), encoded_line(part, key, value)
                self.stored = store_kept_keys(part, part.kept, older, query, key, value, encoded)
            raise Written
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_BNH = attend_step(self._last_step(), (query[:, :, 0], *self.new), scale)
        self.new = None
        if self.part.kept is not None and self.stored is not None:
            hold_to_bound(self.part, self.part.kept, self.stored)
            self.stored = None
        return out_BNH[:, None]

    def _last_step(self) -> LayerStep:
        """The layer as a decoding step finds it that stores each row's last token: where that is stored
        already."""
        part, buffer, device = self.part, self.part.buffer, self.line.last.device
        counts, columns_B = part.counts, part.columns[self.line.last]
        ring = buffer.ring_kept if isinstance(buffer, RingBuffer) else None
        table, position_B1 = sent(torch.tensor(addresses(buffer)), device), sent(torch.tensor(counts), device)
        position_B1 = (position_B1 - 1)[:, None]
        if ring is None:
            lengths = [n - 1 for n in counts]
            keep_U = torch.ones(len(counts), dtype=torch.bool, device=device)
        else:
            gates, recent = len(ring) // len(counts), ring.shape[1]
            # While a ring fills up, each token makes the row longer; later it takes the place of another one,
            # which has moved behind the ring by now if it is kept, and must not move once more.
            lengths = [n - (counts[u // gates] <= recent) for u, n in enumerate(buffer.lengths)]
            slot_U1 = (position_B1 % recent).repeat_interleave(gates, 0)
            keep_U = ring.gather(1, slot_U1)[:, 0]
            ring.scatter_(1, slot_U1, False)
        lengths_U = sent(torch.tensor(lengths, dtype=torch.int32), device)
        return LayerStep(
            table, lengths_U, keep_U, columns_B, ring, position_B1, buffer=buffer, int8=part.int8
        )


class LeavingKeysPrefill(LeavingPrefill, KeptKeysPrefill):
    """The same where routers decide whose keys and values stay: they read the state where tokens leave. So
    the first of these layers has all of them decide, and the host waits once, not once a layer."""

    def decide_keys(self, arguments: LayerArguments) -> None:
        own_class = self.layer.dense_class
        for other in self.line.left:
            if other.part.kept is None and other.layer.dense_class is own_class:
                other.decide(arguments.bound.args, arguments.bound.kwargs)
