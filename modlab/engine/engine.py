"""The engine of one model: what prefill and decoding steps share, and the steps captured so far."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from modlab.cache.int8 import Int8Range
from modlab.engine.attention import register
from modlab.engine.branch import Branch, HostBranch, choose_branch
from modlab.engine.budget import Budget, LayerBytes, layer_bytes
from modlab.engine.compiled import Compiler
from modlab.engine.deferred import MOST_TOKENS
from modlab.engine.forms import form_of
from modlab.engine.guesses import Guesses
from modlab.engine.lending import attention_modules
from modlab.engine.prefill import scratch_buffers
from modlab.engine.refusals import rounding_refusal
from modlab.engine.step import Step
from modlab.engine.turns import Turns
from modlab.errors import ModlabError
from modlab.execution.routed import RoutedKeys
from modlab.hf.anatomy import decoder_layers
from modlab.hf.attention_names import attention_named
from modlab.hf.model import eval_mode
from modlab.hf.names import cache_argument
from modlab.routing.state import Routing, is_converted, routing_override
from modlab.routing.table import RoutingTable
from modlab.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LINE_TOKENS = 65536
"""Tokens of a prefill that run at once. Further rows run in a further line, so that activations stay
bounded."""

MAX_STEPS = 16
"""Batch sizes whose captured steps are kept, each with memory of its own for what it computes."""


class Engine:
    """Prefill and decoding of one model, dense or converted, without padding, host syncs or skipped work.

    Args:
        model: the model.
        compile: compile a decoding step, and layers and norms of prefills that are not short, with
            torch.compile (CUDA only); "layers": a step's layers and the choice of tokens alone.
        compiler: makes what compiles a step, or leaves it as it is, when told whether to.
        make_step: makes the step of a batch size.
        max_steps: batch sizes whose steps are kept.
        line_tokens: tokens of a prefill that run at once.
        kv_tokens, kv_mib: what a generation may store, see `Budget`.
        guess: whether prompts run on guessed numbers of kept tokens, see `guesses.py`.

    Attributes:
        form: how routed layers run; None where the engine has no form for what they skip.
        branch: how routed layers are skipped, and `branch_note` why not in a better way.
        uncompiled: what runs as it is although it was to be compiled, by name, with the reason.
        guesses: how many tokens layers of a prompt keep, guessed; None where each layer asks the GPU.
        defer_tokens: tokens of a prefill's line up to which layers that keep some keys are given exact room
            only when the next layer has come to its attention (`deferred.py`); 0 where there is no GPU to
            wait for.
        last: facts of the latest generation.

    Raises:
        ModlabError: another `compile`, a guess where nothing is guessed, a bound where there is none to keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compile: bool | str = True,
        compiler: Callable[[bool], Compiler] = Compiler,
        make_step: Callable[[Engine, int], Step] = Step,
        max_steps: int = MAX_STEPS,
        line_tokens: int = LINE_TOKENS,
        kv_tokens: int | None = None,
        kv_mib: float | None = None,
        guess: bool = False,
    ) -> None:
        register()
        self.model: Any = model
        self.layers: list[nn.Module] = list(decoder_layers(model))
        self.routing: Routing | None = model.mod if is_converted(model) else None  # type: ignore[assignment]
        self.form = form_of(self.routing)
        self.device = next(model.parameters()).device
        self.compiler, self.make_step = compiler, make_step
        self.max_steps, self.line_tokens = max_steps, line_tokens
        self.branch: Branch
        self.branch, self.branch_note = choose_branch(self.device)
        if compile not in (True, False, "layers"):
            raise ModlabError(f"compile={compile!r}: choose True, False or 'layers'.")
        self.compile: bool | str = compile if self.device.type == "cuda" else False
        self.uncompiled: dict[str, str] = {}
        self.line_compiler = Compiler(enabled=True)  # for prefills, whatever their batch size
        self.kept_keys = [m for m in model.modules() if isinstance(m, RoutedKeys)]
        self.attention = [attention_modules(layer) for layer in self.layers]
        self.configs: list[Any] = list(
            {id(m.config): m.config for m in model.modules() if _has_config(m)}.values()
        )
        self.steps: dict[int, Step] = {}
        self.turns = Turns()  # one generation at a time: it lends functions to the model
        self.caller = threading.local()  # `own_cache`: whether the call of this thread brought a cache
        if guess and (self.form is None or not self.form.packs):
            raise ModlabError(
                "guess=True guesses how many tokens of a prompt routed layers run (skip='layer', 'attention' "
                f"or 'mlp' in the engine): {self._why_no_guess}. Leave guess away."
            )
        self.guesses = Guesses() if guess else None
        self.defer_tokens = MOST_TOKENS if self.device.type == "cuda" else 0
        self.last: dict[str, Any] = {}
        self.bound: Budget | None = None
        if kv_tokens is not None or kv_mib is not None:
            self.bound = self._budget(kv_tokens, kv_mib)

    @property
    def _why_no_guess(self) -> str:
        without = self.routing.skip.why_no_engine(self.routing.config) if self.routing else ""
        return without or "this model has none that leave tokens out"

    def _budget(self, kv_tokens: int | None, kv_mib: float | None) -> Budget:
        if self.keep_recent is None or self.form is None:
            raise ModlabError(
                "kv_tokens and kv_mib bound a cache that routing decides about (skip='kv' or 'kv+prompt'): "
                "this model has none."
            )
        if why := rounding_refusal(self.routing):
            raise ModlabError(f"kv_tokens and kv_mib bound what the engine stores. {why}")
        return Budget(kv_tokens, kv_mib, self.keep_recent, self._layer_bytes())

    def _layer_bytes(self) -> tuple[LayerBytes, ...]:
        self._measured = self.ranges
        with torch.no_grad(), eval_mode(self.model):
            return layer_bytes(scratch_buffers(self, 1))

    @property
    def budget(self) -> Budget | None:
        """What a generation may store, at the present `keep_recent` and `kv_cache_dtype`; None without a
        bound.

        Raises:
            ModlabError: fewer tokens than are recent by now.
        """
        recent = self.keep_recent
        if self.bound is not None and recent is not None and self.bound.recent != recent:
            self.bound = dataclasses.replace(self.bound, recent=recent)
        if self.bound is not None and self._measured != self.ranges:
            self.bound = dataclasses.replace(self.bound, layers=self._layer_bytes())
        return self.bound

    @property
    def ranges(self) -> Mapping[int, Int8Range]:
        """Of each layer that stores keys and values in eight bits; other bits are refused (`refusals.py`)."""
        return {} if self.routing is None else cast("Mapping[int, Int8Range]", self.routing.ranges)

    @property
    def keep_recent(self) -> int | None:
        """Latest tokens that each token sees, kept or not, where routing decides about the cache alone."""
        return None if self.routing is None else self.routing.recent

    @contextlib.contextmanager
    def forward_as(self, attention: str) -> Iterator[None]:
        """Inside this block the model attends by the engine's function and its routing hooks stand aside."""
        try:
            with attention_named(self.configs, attention):
                if self.routing is not None:
                    self.routing.of_thread.bypass = True
                yield
        finally:
            if self.routing is not None:
                self.routing.of_thread.bypass = False

    @property
    def routed(self) -> list[int]:
        """Indices of the routed layers."""
        return [] if self.routing is None else self.routing.layers

    @property
    def forced(self) -> list[int]:
        """Indices of the layers where a table may decide instead of gates."""
        return [] if self.routing is None or self.routing.skip.decides_itself else self.routed

    def deciding(self, keep: dict[int, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Inside this block these tables, bool [B, P] or [B, P, G], decide instead of gates, a routed layer
        each."""
        if self.routing is None or not keep:
            return contextlib.nullcontext()
        return routing_override(self.model, RoutingTable(keep))

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

    def release(self) -> None:
        """Frees the buffers of the latest generation."""
        for step in self.steps.values():
            step.tables.release()

    def fall_back(self, why: str) -> None:
        """Steps run from the host from now on; `fast_generation_report` says why."""
        self.branch, self.branch_note = HostBranch(), why.splitlines()[0]
        self.compile = False
        warn(f"fast generation goes on without CUDA graphs: {self.branch_note}")

    def compile_less(self, why: str) -> None:
        """Steps are captured uncompiled from now on; `fast_generation_report` says why."""
        self.compile, self.uncompiled = False, {"layers": why}
        warn(f"fast generation goes on without torch.compile: {why}")

    def step(self, batch: int) -> Step:
        """The decoding step for `batch` rows, captured at its first use."""
        step = self.steps.pop(batch, None)
        if step is None or not step.is_current():
            step = None  # its graph is freed before another takes memory
            # What is made here outlives a caller's inference mode, whose tensors cannot be written outside.
            with torch.inference_mode(False), torch.no_grad():
                step = self.make_step(self, batch)
        self.steps[batch] = step  # the latest used is the last
        while len(self.steps) > self.max_steps:
            del self.steps[next(iter(self.steps))]
        return step


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)
