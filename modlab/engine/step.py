"""One decoding step: captured once for a batch size, replayed for every token.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.engine.attention import DECODE
from modlab.engine.branch import Body, Branch, HostBranch
from modlab.engine.choice import end_step
from modlab.engine.compiled import MAX_COMPILED, Compiler, outside_layers, reason_of
from modlab.engine.forms import step_forwards
from modlab.engine.lending import lent, lent_values, one_token_linears, unrouted
from modlab.engine.prefill import scratch_buffers
from modlab.engine.step_layers import StepPass
from modlab.engine.tables import Tables
from modlab.hf.anatomy import decoder_of
from modlab.hf.parts import parts
from modlab.kernels.aside import nothing_left_aside
from modlab.kernels.launch import KernelRefused

if TYPE_CHECKING:
    from modlab.engine.engine import Engine


class Step:
    """One decoding step for `batch` rows, as a CUDA graph where there are IF nodes, else run from the host.

    Attributes:
        tables: its inputs; `choice.token` and `position` are long [B, 1].
        logits: [B, V] of the latest step.
    """

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine = engine
        routing = engine.routing
        routed = routing.layers if routing is not None else []
        assert engine.form is not None, "calls are refused before"
        self.form = engine.form
        skips_keys = routing is not None and not routing.skip.stores_all
        gates = routing.gates if routing is not None else {}
        self.tables = Tables(
            len(engine.layers), routed, batch, engine.device, skips_keys, engine.keep_recent, gates,
            None if routing is None or engine.budget is None else routing.config.keep_first, engine.ranges,
        )  # fmt: skip
        self.recent, self.ranges = engine.keep_recent, engine.ranges
        self.weights = _addresses(engine.model)
        self.graph: Any = None
        self.logits: Tensor
        if not isinstance(engine.branch, HostBranch):
            try:
                self._capture_or_less(batch)
            except (torch.OutOfMemoryError, KernelRefused):  # says nothing of the model
                self.tables.release()
                raise
            except RuntimeError as error:  # what a model does on the host cannot be captured
                self.graph = None
                self.tables.release()
                engine.fall_back(f"{type(engine.model).__name__} cannot be captured in a CUDA graph: {error}")

    def is_current(self) -> bool:
        """False once the model's weights have moved, since a captured graph would read the old ones, and
        where rings have another size now, or numbers of another size."""
        same_rings = self.recent == self.engine.keep_recent and self.ranges == self.engine.ranges
        return same_rings and self.weights == _addresses(self.engine.model)

    def run(self) -> None:
        """Decodes `choice.token`; the result is in `logits`, and the best next token in `choice.token`.
        Positions and columns move on.
        """
        routing = self.engine.routing
        if routing is not None:
            self.tables.set_thresholds(routing.thresholds)
        self.tables.reserve()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._forward(self.engine.branch, None, self.engine.compiler(False))

    @torch.no_grad()
    def _forward(self, branch: Branch, graph: Any, compiler: Compiler) -> None:
        engine, tables = self.engine, self.tables
        step = StepPass(engine.routing, tables, branch, graph, compiler.layer)
        forwards = step_forwards(self.form, engine.layers, step)
        if compiler.enabled and engine.compile != "layers":
            for name, module in outside_layers(decoder_of(engine.model), engine.layers).items():
                forwards[module] = compiler.whole(name, module.forward)
        with (
            engine.forward_as(DECODE),
            lent_values(engine.attention, "mod_step", tables.layers),
            one_token_linears(engine.model, tables.batch),
            unrouted(m for m in engine.kept_keys if m not in forwards),
            lent(forwards),
            nothing_left_aside(),
        ):
            logits_B1V = engine.run_model(tables.choice.token, tables.position)
        self.logits = logits_B1V[:, -1]
        compiler.whole("choice of tokens", end_step)(
            self.logits, tables.choice, tables.position, tables.column
        )

    def _capture_or_less(self, batch: int) -> None:
        """Captures the step compiled, or, where torch.compile fails on a layer, as it is."""
        try:
            self.capture(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.tables.release()
            self.engine.compile_less(reason_of(error))
            self.capture(batch)

    def capture(self, batch: int) -> None:
        """Records the step as a CUDA graph.

        Raises:
            RuntimeError: the model does something that no graph can hold.
            torch._dynamo.exc.TorchDynamoException: torch.compile fails on a layer.
        """
        engine, tables = self.engine, self.tables
        compiler = engine.compiler(bool(engine.compile))
        tables.attach(scratch_buffers(engine, batch), 0, [0] * batch)
        if engine.routing is not None:
            tables.set_thresholds(engine.routing.thresholds)
        limits: dict[str, Any] = {"recompile_limit": MAX_COMPILED}
        with torch._dynamo.config.patch(limits), torch.cuda.device(engine.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles, loads kernels and plans: none of that may happen in a capture
                    self._forward(_Always(), None, compiler)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="relaxed"):
                self._forward(engine.branch, self.graph, compiler)
        tables.release()
        engine.uncompiled |= compiler.eager


class _Always(HostBranch):
    """Runs every body, for the warm-up."""

    def run_if(self, graph: Any, flag_1: Tensor, body: Body) -> None:
        body()


def _addresses(model: nn.Module) -> tuple[Any, ...]:
    """What a captured graph takes for granted: where weights and buffers are, how adapters (PEFT's) stand."""
    modules: list[Any] = parts(model)
    held = (
        tensor.data_ptr()
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    # Asked of classes, where PEFT has them: a module that lacks a name looks for it among its parts.
    adapters = (
        (module.merged, module.disable_adapters, tuple(module.active_adapters))
        for module in modules
        if hasattr(type(module), "active_adapters") and hasattr(type(module), "merged")
    )
    return (*held, *adapters)
