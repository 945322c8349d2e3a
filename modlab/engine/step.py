"""One decoding step: captured once for a batch size, replayed for every token.

Shape letters: B rows, V vocabulary, C chunks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modlab.engine.attention import DECODE
from modlab.engine.branch import Body, Branch, HostBranch
from modlab.engine.layers import Forward, decode_forwards, lent, slots
from modlab.engine.linears import one_token_linears
from modlab.engine.prefill import scratch_caches
from modlab.engine.tables import Tables

if TYPE_CHECKING:
    from modlab.engine.engine import Engine

MAX_COMPILED = 64
"""Variants of a layer that torch.compile may make (batch sizes, layer types) before it gives up."""

ARGMAX_CHUNKS = 64
"""torch gives a row's argmax to one multiprocessor: 32 us for 128,256 logits on an H200; in chunks 5 us."""


class Step:
    """One decoding step for `batch` rows, as a CUDA graph where there are IF nodes, else run from the host.

    Attributes:
        tables: its inputs; `token` and `position` are long [B, 1].
        logits: [B, V] of the latest step.
        best: their argmax, long [B].
    """

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine = engine
        routed = engine.routing.layers if engine.routing is not None else []
        self.tables = Tables(len(engine.layers), routed, batch, engine.device)
        self.weights = _addresses(engine.model)
        self.graph: Any = None
        self.logits: Tensor
        self.best: Tensor
        if not isinstance(engine.branch, HostBranch):
            try:
                self._capture(batch)
            except torch.OutOfMemoryError:  # says nothing of the model
                self.tables.release()
                raise
            except RuntimeError as error:  # what a model does on the host cannot be captured
                self.graph = None
                self.tables.release()
                engine.fall_back(f"{type(engine.model).__name__} cannot be captured in a CUDA graph: {error}")

    def is_current(self) -> bool:
        """False once the model's weights have moved: a captured graph would read the old ones."""
        return self.weights == _addresses(self.engine.model)

    def run(self) -> None:
        """Decodes `tables.token`; the result is in `logits` and `best`. Positions and columns move on."""
        routing = self.engine.routing
        if routing is not None:
            self.tables.set_thresholds(routing.thresholds)
        self.tables.reserve()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._forward(self.engine.branch, None, _as_is)

    @torch.no_grad()
    def _forward(self, branch: Branch, graph: Any, compiled: Callable[[Forward], Forward]) -> None:
        engine, tables = self.engine, self.tables
        forwards = decode_forwards(engine.layers, engine.routing, tables, branch, graph, compiled)
        with (
            engine.forward_as(DECODE),
            slots(engine.attention, "mod_decode", list(tables.slots)),
            slots(engine.attention, "mod_cache", list(tables.caches)),
            one_token_linears(engine.model, tables.batch),
            lent(forwards),
        ):
            logits_B1V = engine.run_model(tables.token, tables.position)
        self.logits = logits_B1V[:, -1]
        self.best = compiled(best_token)(self.logits)
        tables.position.add_(1)
        tables.column.add_(1)

    def _capture(self, batch: int) -> None:
        engine, tables = self.engine, self.tables
        compiled = _compile if engine.compile else _as_is
        tables.attach(scratch_caches(engine, batch), 0, [0] * batch)
        if engine.routing is not None:
            tables.set_thresholds(engine.routing.thresholds)
        limits: dict[str, Any] = {"recompile_limit": MAX_COMPILED}
        with torch._dynamo.config.patch(limits), torch.cuda.device(engine.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles, loads kernels and plans: none of that may happen in a capture
                    self._forward(_Always(), None, compiled)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="relaxed"):
                self._forward(engine.branch, self.graph, compiled)
        tables.release()


class _Always(HostBranch):
    """Runs every body, for the warm-up."""

    def run_if(self, graph: Any, flag_1: Tensor, body: Body) -> None:
        body()


def best_token(logits_BV: Tensor) -> Tensor:
    """Argmax over the vocabulary, long [B], by chunks; the first of equals wins."""
    padded = F.pad(logits_BV, (0, -logits_BV.shape[1] % ARGMAX_CHUNKS), value=-torch.inf)
    chunks_BCV = padded.unflatten(1, (ARGMAX_CHUNKS, -1))
    top_BC, at_BC = chunks_BCV.max(-1)
    chunk_B1 = top_BC.argmax(-1, keepdim=True)
    return (chunk_B1 * chunks_BCV.shape[2] + at_BC.gather(1, chunk_B1))[:, 0]


def _compile(function: Forward) -> Forward:
    return torch.compile(function, dynamic=False)


def _as_is(function: Forward) -> Forward:
    return function


def _addresses(model: nn.Module) -> tuple[Any, ...]:
    """Where the weights are, and how adapters (PEFT's) stand: what a captured graph takes for granted."""
    modules: Iterator[Any] = model.modules()
    adapters = (
        (module.merged, module.disable_adapters, tuple(module.active_adapters))
        for module in modules
        if hasattr(module, "active_adapters") and hasattr(module, "merged")
    )
    return (*(p.data_ptr() for p in model.parameters()), *adapters)
