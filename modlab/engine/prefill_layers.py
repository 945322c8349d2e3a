"""How a decoder layer runs in a prefill: on the kept tokens of all rows in one line.

The family's own forward of model and layers stays in charge. For the length of one prefill each routed layer,
what its router decides for, and each MLP run a method of an object of this file (see `lending`), which calls
the module's own code. One class a form: a layer without a router, whole layers routed, attention or MLP
alone, the cache alone. `forms` says which one a model's layers have.

Shape letters: S tokens of all rows in one line, R tokens of them that run, B rows, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modlab.engine.attention import KeptKeys, LayerPrefill, LineBlocks, attend_line
from modlab.engine.compiled import norm_forwards
from modlab.engine.compiled_layers import LineLayers, line_mlp
from modlab.engine.guesses import guessed_places
from modlab.execution.gate import gated_output, scaled_branches
from modlab.execution.routed import CALL, RoutedModule
from modlab.hf.anatomy import attention_name, mlp_name
from modlab.hf.arguments import LayerArguments
from modlab.kernels.aside import aside
from modlab.kernels.ring_budget import score_of
from modlab.kernels.router_logits import router_logits
from modlab.routing.record import Decision
from modlab.routing.state import Routing
from modlab.skips.base import Part

Forward = Callable[..., Any]

MLP_CHUNK = 16384
"""Tokens that an MLP takes at once in prefill: its inner activations, 3.5 times as wide, set the peak."""


ASIDE_TOKENS = 4096
"""Tokens of a line from which on routers run next to the projections of their layer. On an H200 a router and
what follows from it take 12 short kernels and 120 us of a layer of 4,096 tokens of the 8B shape in line
(docs/log.md). The host has a stream more to tell of what to do, which shorter prompts wait for."""


@dataclass
class PrefillLine:
    """What the layers of one prefill share.

    Attributes:
        routing: of the model; None for a dense one.
        last: last position of each row in the line, long [B].
        blocks: the line as kernels cut it.
        most_older: tokens that a row may store besides its ring (`budget`); None for no bound.
        compiled: runs layers by torch.compile; None where nothing is compiled.
        guesses: tokens that a layer runs, by its index, where that was guessed (`guesses`).
        kept: tokens that a layer has kept, by its index: a tensor [] of those that were guessed.
        entered: state [1, S, D] with which all tokens entered the first layer that they leave out.
        left: what runs the layers that they leave out, in their order.
    """

    routing: Routing | None
    last: Tensor
    blocks: LineBlocks
    most_older: int | None = None
    compiled: LineLayers | None = None
    guesses: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int | Tensor] = field(default_factory=dict)
    entered: Tensor | None = None
    left: list[Any] = field(default_factory=list)


@dataclass
class Packed:
    """Tokens of the line that a layer runs.

    Attributes:
        ends: how many of the rows up to each have, and `ends_B` the same on the device.
        varying: whether these are other numbers than those of the layer's neighbours.
        places: in the line, long [R]; None: all or none of them.
        real: False at places that are there only because so many were guessed, bool [R]; None: nowhere.
    """

    ends: list[int]
    ends_B: Tensor
    varying: bool
    places: Tensor | None
    real: Tensor | None = None

    @property
    def size(self) -> int:
        """R."""
        return self.ends[-1]


class DensePrefill:
    """A layer without a router: as its family wrote it, its MLP in pieces.

    Args:
        layer: the decoder layer.
        index: its own.
        part: what its attention is told, and tells.
        line: what it shares with the other layers.

    Attributes:
        fused: whether its forward is compiled.
    """

    one_graph: ClassVar[bool] = True
    """Whether layers of this form can be compiled in one piece."""

    def __init__(self, layer: Any, index: int, part: LayerPrefill, line: PrefillLine) -> None:
        self.layer, self.index, self.part, self.line = layer, index, part, line
        name = mlp_name(layer)
        self.mlp = None if name is None else layer.get_submodule(name)
        parts = [layer] if self.mlp is None else [layer, self.mlp]
        foreign = any("forward" in part.__dict__ for part in parts)  # somebody's own, and whatever it does
        self.fused = self.one_graph and line.compiled is not None and line.compiled.compiles and not foreign

    def forwards(self) -> dict[nn.Module, Forward]:
        """What the layer and modules inside it run instead of their own forwards."""
        forwards: dict[nn.Module, Forward] = {}
        if self.fused:
            forwards[self.layer] = self.run_layer
            if self.mlp is not None and sum(self.part.counts) > MLP_CHUNK:
                forwards[self.mlp] = line_mlp
            return forwards
        if self.line.compiled is not None:
            forwards |= norm_forwards([self.layer], self.line.compiled.compiler)
        if self.mlp is not None:
            forwards[self.mlp] = partial(_chunked, _own_forward(self.mlp))
        return forwards

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        return self.run_own(*args, **kwargs)

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward as its family wrote it, compiled or not."""
        compiled = self.line.compiled
        if not self.fused or compiled is None:
            return self.layer.dense_class.forward(self.layer, *args, **kwargs)
        in_pieces = None if self.mlp is None else partial(_chunked, partial(compiled.run_mlp, self.mlp))
        return compiled.run(self.layer, partial(attend_line, self.part), in_pieces, args, kwargs)


class RoutedPrefill(DensePrefill):
    """A layer with a router: it decides at its entrance.

    Attributes:
        decision: who is kept; there once the layer has been entered.
        gated: the part of the layer whose output the gate enters.
    """

    gated: ClassVar[Part] = "layer"

    def __init__(self, layer: Any, index: int, part: LayerPrefill, line: PrefillLine) -> None:
        super().__init__(layer, index, part, line)
        assert line.routing is not None
        self.routing = line.routing
        self.decision: Decision | None = None

    def forwards(self) -> dict[nn.Module, Forward]:
        return super().forwards() | {self.layer: self.run_layer}

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward; this one decides, and runs the layer on all tokens."""
        self.decide(args, kwargs)
        return self.run_own(*args, **kwargs)

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerArguments:
        """Decides for all tokens of the line; the layer's arguments, `kwargs` without modlab's own."""
        kwargs.pop(CALL, None)
        arguments = LayerArguments(self.layer.dense_class, args, kwargs)
        logits = partial(router_logits, self.layer.mod_router)
        self.decision = self.routing.decide(self.index, logits, arguments.residual_BTD, training=False)
        return arguments

    def run_kept(
        self, module: RoutedModule, forward: Forward, arguments: LayerArguments, attends: bool, residual: bool
    ) -> Any:
        """Packs the kept tokens of all rows and runs the module on them; the others are not touched.

        Args:
            attends: whether there is attention in the module, which has to know who comes to it.
            residual: True if a skipped token passes through (a layer), False if it becomes zero (a sublayer).
        """
        assert self.decision is not None
        x, gate_1S, keep_S = arguments.hidden, self.decision.gate, self.decision.keep[0]
        changes: dict[str, Any] = {}
        size = self.line.guesses.get(self.index)
        packed = self._asked(keep_S) if size is None else self._guessed(keep_S, size)
        if packed.places is not None:
            first = torch.zeros(1, 1, dtype=torch.long, device=x.device)
            changes = arguments.select(first, packed.places[None])
            gate_1S = gate_1S[:, packed.places]
        if attends:
            self._tell_attention(packed)
        if packed.size == 0:
            out = x if residual else torch.zeros_like(x)
            return module.joined(out, (None,) * module.mod_plan.extra_outputs)
        form = self.routing.skip.gate_form(self.routing.config, self.gated)
        with scaled_branches(module, module.mod_plan.branch_ends, gate_1S if form == "scaled" else None):
            y, rest = arguments.run(forward, changes)
        skipped = changes.get(arguments.hidden_name, x) if residual else 0.0
        y = gated_output(form, y, skipped, gate_1S, False)
        if packed.real is not None:
            y = torch.where(packed.real[None, :, None], y, skipped)
        if packed.places is not None:
            out = x if residual else torch.zeros_like(x)
            y = out.index_copy_(1, packed.places, y.to(x.dtype))
        return module.joined(y, tuple(None for _ in rest), arguments.in_tuple)

    def _asked(self, keep_S: Tensor) -> Packed:
        """The kept tokens; the host waits for their number."""
        passed_B = keep_S.cumsum(0)[self.line.last]
        passed = passed_B.tolist()  # the one host sync of the layer
        kept = self.line.kept[self.index] = passed[-1]
        varying = kept < len(keep_S)
        places = torch.nonzero_static(keep_S, size=kept)[:, 0] if kept and varying else None
        return Packed(passed, passed_B, varying, places)

    def _guessed(self, keep_S: Tensor, size: int) -> Packed:
        """So many tokens of one row, the kept ones first."""
        self.line.kept[self.index] = keep_S.sum()
        places, real = guessed_places(keep_S, size)
        return Packed([size], self.part.bounds[1:].clamp(max=size), True, places, real)

    def _tell_attention(self, packed: Packed) -> None:
        """Which tokens of the line come to the layer's attention."""
        part, ends = self.part, packed.ends
        part.counts = [b - a for a, b in zip([0, *ends], ends, strict=False)]
        part.varying = packed.varying
        part.bounds = F.pad(
            packed.ends_B, (1, 0)
        ).int()  # small, and by now the GPU has large tensors to gather
        if packed.size == 0:
            part.buffer.lengths, part.columns = part.counts, part.columns[:0]
        elif packed.places is not None:
            part.columns = part.columns[packed.places]


class WholeLayerPrefill(RoutedPrefill):
    """The layer runs on its kept tokens; the others pass it by."""

    def __init__(self, layer: Any, index: int, part: LayerPrefill, line: PrefillLine) -> None:
        super().__init__(layer, index, part, line)
        # Hooks put the paper's gate inside the layer, and hooks are not compiled.
        self.fused &= self.routing.skip.gate_form(self.routing.config, self.gated) != "scaled"

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.decide(args, kwargs)
        return self.run_kept(self.layer, self.run_own, arguments, attends=True, residual=True)


class SublayerPrefill(RoutedPrefill):
    """The layer runs on all tokens, one sublayer of it on the kept ones.

    Attributes:
        attends: whether that is the attention.
    """

    attends: ClassVar[bool]
    one_graph = False  # the sublayer's place in it is not compiled

    def __init__(self, layer: Any, index: int, part: LayerPrefill, line: PrefillLine) -> None:
        super().__init__(layer, index, part, line)
        self.sublayer: Any = layer.get_submodule(self.name_in(layer) or "")

    @staticmethod
    def name_in(layer: nn.Module) -> str | None:
        """The sublayer's name in its layer."""
        raise NotImplementedError

    def forwards(self) -> dict[nn.Module, Forward]:
        forwards = super().forwards()
        self.own = forwards.get(self.sublayer, _own_forward(self.sublayer))
        return forwards | {self.sublayer: self.run_sublayer}

    def run_sublayer(self, *args: Any, **kwargs: Any) -> Any:
        """The sublayer's forward, once the layer has decided."""
        arguments = LayerArguments(self.sublayer.dense_class, args, kwargs)
        return self.run_kept(self.sublayer, self.own, arguments, self.attends, residual=False)


class AttentionPrefill(SublayerPrefill):
    """The layer's attention runs on the kept tokens alone."""

    gated = "attention"
    attends = True

    name_in = staticmethod(attention_name)


class MLPPrefill(SublayerPrefill):
    """The layer's MLP runs on the kept tokens alone."""

    gated = "mlp"
    attends = False

    name_in = staticmethod(mlp_name)


class KeptKeysPrefill(RoutedPrefill):
    """The layer runs on all tokens; its attention is told whose keys and values stay."""

    def __init__(self, layer: Any, index: int, part: LayerPrefill, line: PrefillLine) -> None:
        super().__init__(layer, index, part, line)
        self.recent = self.routing.recent

    def decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerArguments:
        with self._next_to_projections():
            arguments = super().decide(args, kwargs)
            assert self.decision is not None and self.recent is not None
            keep, score = self.decision.keep[0], None
            if self.line.most_older is not None:
                position_S = self.routing.require_call().position_ids[0]
                score = score_of(self.decision.gate[0], position_S, self.routing.config.keep_first)
            self.part.kept = KeptKeys(
                keep, self.part.bounds, self.recent, self.line.blocks, self.line.most_older, score
            )
        return arguments

    def _next_to_projections(self) -> contextlib.AbstractContextManager[None]:
        """Nobody but attention asks who is kept; it waits for what is launched here (`attend_line`)."""
        compiled, blocks = self.line.compiled, self.line.blocks
        waits = compiled is not None and compiled.compiles and sum(blocks.counts) >= ASIDE_TOKENS
        return aside(blocks.device) if waits else contextlib.nullcontext()


def _own_forward(module: nn.Module) -> Forward:
    """The forward that `module` would have without a router."""
    return partial(module.dense_class.forward, module) if isinstance(module, RoutedModule) else module.forward


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
