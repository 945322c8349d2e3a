"""The engine of one model: prefill in one line, then one CUDA graph a step.

Shape letters: B rows, T tokens in (padding included), S tokens of all rows in one line, L layers, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from modlab.anatomy import decoder_layers
from modlab.cache import RaggedLayer
from modlab.cache_argument import cache_argument
from modlab.engine.attention import DECODE, PREFILL, CannotCapture, PrefillSlot, register
from modlab.engine.branch import Branch, HostBranch, choose_branch
from modlab.engine.layers import Forward, attention_modules, decode_forwards, lent, prefill_forwards, slots
from modlab.engine.tables import Tables
from modlab.layer import RoutedLayer
from modlab.routing import ForwardCall, Routing, is_converted
from modlab.routing_table import RoutingTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCRATCH_TOKENS = 64
"""Room a row in the caches that a graph is captured with."""

MAX_COMPILED = 64
"""Variants of a layer that torch.compile may make (batch sizes, layer types) before it gives up."""


class Engine:
    """Prefill and decoding of one model, dense or converted, without padding, host syncs or skipped work.

    Args:
        model: the model.
        compile: compile the layers of a decoding step with torch.compile (CUDA only).

    Attributes:
        branch: how routed layers are skipped, and `branch_note` why not in a better way.
        last: facts of the latest generation.
    """

    def __init__(self, model: PreTrainedModel, compile: bool = True) -> None:
        register()
        self.model: Any = model
        self.layers: list[nn.Module] = list(decoder_layers(model))
        self.routing: Routing | None = model.mod if is_converted(model) else None  # type: ignore[assignment]
        self.device = next(model.parameters()).device
        self.branch, self.branch_note = choose_branch(self.device)
        self.compile = compile and self.device.type == "cuda"
        self.attention = [attention_modules(layer) for layer in self.layers]
        self.configs = list({id(m.config): m.config for m in model.modules() if _has_config(m)}.values())
        self.steps: dict[int, Step] = {}
        self.last: dict[str, Any] = {}

    # ---- the two kinds of forward ----

    @contextlib.contextmanager
    def forward_as(self, attention: str) -> Iterator[None]:
        """Inside this block the model attends by the engine's function and its routing hooks stand aside."""
        before = [config._attn_implementation_internal for config in self.configs]
        try:
            for config in self.configs:
                config._attn_implementation_internal = attention
            if self.routing is not None:
                self.routing.bypass = True
            yield
        finally:
            for config, name in zip(self.configs, before, strict=True):
                config._attn_implementation_internal = name
            if self.routing is not None:
                self.routing.bypass = False

    def run_model(self, ids: Tensor, position: Tensor, **kwargs: Any) -> Tensor:
        """Logits of the model's own forward, called without cache and mask."""
        output = self.model.forward(
            input_ids=ids,
            position_ids=position,
            attention_mask=None,
            use_cache=False,
            return_dict=True,
            **{cache_argument(self.model): None},
            **kwargs,
        )
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, list[RaggedLayer], list[int]]:
        """Runs the prompts, all rows in one line without padding.

        Args:
            mask_BT: 1 for tokens, 0 for padding; None for no padding.

        Returns:
            logits of each row's last token [B, V], one cache a layer with room for decoding, tokens a row.
        """
        B, T = ids_BT.shape
        device = ids_BT.device
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        counts: list[int] = [T] * B if mask_BT is None else real_BT.sum(1).tolist()
        columns_S = torch.arange(T, device=device, dtype=torch.int32).expand(B, T)[real_BT]
        position_1S = (real_BT.long().cumsum(1) - 1)[real_BT][None]
        rows_S = torch.arange(B, device=device)[:, None].expand(B, T)[real_BT]
        ends_B = torch.tensor(counts, device=device).cumsum(0)
        caches = [RaggedLayer() for _ in self.layers]
        states = [
            PrefillSlot(cache, counts, columns_S, varying=isinstance(layer, RoutedLayer))
            for layer, cache in zip(self.layers, caches, strict=True)
        ]
        forwards = prefill_forwards(self.layers, self.routing, states, ends_B)
        call = self._flat_call(position_1S, rows_S, T)
        with call, self.forward_as(PREFILL), slots(self.attention, "mod_prefill", states), lent(forwards):
            logits_1BV = self.run_model(ids_BT[real_BT][None], position_1S, logits_to_keep=ends_B - 1)
        if logits_1BV.shape[1] != B:
            raise CannotCapture("its forward does not take logits_to_keep")
        _fill_empty(states)
        for cache in caches:
            cache.cumulative_length = T
        return logits_1BV[0], caches, counts

    @contextlib.contextmanager
    def _flat_call(self, position_1S: Tensor, rows_S: Tensor, columns: int) -> Iterator[None]:
        """Inside this block `Routing.decide` sees the line of all rows as its forward."""
        routing = self.routing
        if routing is None:
            yield
            return
        before, override = routing.call, routing.override
        if isinstance(override, RoutingTable):
            table = override

            def override(layer: int, gate: Tensor, position: Tensor) -> Tensor:
                return table.lookup(layer, rows_S[None], position)

        routing.call = ForwardCall(
            torch.ones_like(position_1S, dtype=torch.bool),
            position_1S,
            columns=position_1S[0],
            num_columns=columns,
            cache=None,
            steps=[],
            thresholds=dict(routing.thresholds),
            what_if=False,
            masked=False,
            override=override,
        )
        try:
            yield
        finally:
            routing.call = before

    def step(self, batch: int) -> Step:
        """The decoding step for `batch` rows, captured at its first use."""
        if batch not in self.steps or not self.steps[batch].is_current():
            self.steps[batch] = Step(self, batch)
        return self.steps[batch]


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
            self._capture(batch)

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
            lent(forwards),
        ):
            logits_B1V = engine.run_model(tables.token, tables.position)
        self.logits = logits_B1V[:, -1]
        self.best = self.logits.argmax(-1)
        tables.position.add_(1)
        tables.column.add_(1)

    def _capture(self, batch: int) -> None:
        engine, tables = self.engine, self.tables
        compiled = _compile if engine.compile else _as_is
        tables.attach(self._scratch(batch), 0, [0] * batch)
        if engine.routing is not None:
            tables.set_thresholds(engine.routing.thresholds)
        limits = {"recompile_limit": MAX_COMPILED}
        with torch._dynamo.config.patch(**limits), torch.cuda.device(engine.device):
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

    def _scratch(self, batch: int) -> list[RaggedLayer]:
        """Small caches to capture with: one prefilled token a row tells the layers' head sizes."""
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.engine.device)
        engine, everything = self.engine, contextlib.ExitStack()
        if engine.routing is not None:
            keep = {layer: torch.ones(1, 1, dtype=torch.bool) for layer in engine.routing.layers}
            before, engine.routing.override = engine.routing.override, RoutingTable(keep)
            everything.callback(setattr, engine.routing, "override", before)
        with everything:
            _, caches, _ = engine.prefill(ids, None)
        return caches


class _Always(HostBranch):
    """Runs every body, for the warm-up."""

    def run_if(self, graph: Any, flag_1: Tensor, body: Callable[[], None]) -> None:
        body()


def _compile(function: Forward) -> Forward:
    return torch.compile(function, dynamic=False, options=COMPILE_OPTIONS)


COMPILE_OPTIONS: dict[str, Any] = {}


def _as_is(function: Forward) -> Forward:
    return function


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


def _addresses(model: nn.Module) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in model.parameters())


def _fill_empty(states: list[PrefillSlot]) -> None:
    """Gives layers that kept nothing a buffer too: the kernels need an address to append to."""
    known = next((s.cache for s in states if s.cache.is_initialized), None)
    for state in states:
        if not state.cache.is_initialized:
            if known is None or known.keys is None or known.values is None:
                raise CannotCapture("no attention of it came to the engine's attention function")
            cache, B = state.cache, len(state.counts)
            cache.starts, cache.lengths, cache.capacities = ([0] * B for _ in range(3))
            cache._rebuild(list(range(B)), [cache.slack(0)] * B, known.keys.device)
            cache.lazy_initialization(known.keys[None, :, :0], known.values[None, :, :0])
