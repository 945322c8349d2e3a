"""Scores of lm-evaluation-harness, and what the routers kept while they were measured.

    from modlab.integrations.lm_eval import evaluate_tasks

    result = evaluate_tasks(model, tokenizer, ["arc_easy", "my_task.yaml"], limit=100)

The harness runs the converted model as it is, by its own `hf` model class. Most of its tasks fetch their data
from the hub; a task over a local .jsonl file is a YAML file of a few lines (dataset_path: json).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modlab.cache import bytes as kv_bytes
from modlab.errors import ModlabError
from modlab.hf.names import given_cache
from modlab.routing.record import Recording, kept_share
from modlab.routing.state import is_converted, record_routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install 'modlab[eval]'"


@dataclass
class TaskEvaluation:
    """Scores of tasks, and the routing of all forwards that made them.

    Attributes:
        scores: by task: metric -> value, as the harness names them ("acc", "acc_stderr", ...).
        versions: by task, the version of its definition.
        keep_ratio_by_layer: share of tokens kept, by routed layer; empty for a dense model. With a batch_size
            above 1 the harness pads rows on the right without saying so, and that padding is counted.
        kv_bytes: bytes allocated by the caches, summed over the forwards.
        dense_kv_bytes: bytes of dense caches for the same tokens.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    keep_ratio_by_layer: dict[int, float] = field(default_factory=dict)
    kv_bytes: int = 0
    dense_kv_bytes: int = 0

    @property
    def keep_ratio(self) -> float:
        """Share of tokens kept, mean over routed layers; 1.0 for a dense model."""
        return statistics.fmean(self.keep_ratio_by_layer.values()) if self.keep_ratio_by_layer else 1.0

    @property
    def kv_saving(self) -> float:
        """How many times smaller the caches were than dense ones; nan if no forward kept one."""
        return self.dense_kv_bytes / self.kv_bytes if self.kv_bytes else float("nan")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
) -> TaskEvaluation:
    """Runs tasks of lm-evaluation-harness on a model, dense or converted.

    Args:
        model: on its device, in eval mode.
        tokenizer: its tokenizer.
        tasks: names that the harness knows, or paths of task files (.yaml).
        include_path: folder with more task files, then known by name.
        limit: documents a task; all by default.
        num_fewshot: examples in the prompt; the task's own number by default.
        batch_size: rows a forward.

    Raises:
        ModlabError: the harness is not installed, a task is not known, or its data cannot be had.
    """
    evaluator, manager_class, model_class = _harness()
    folder = None if include_path is None else os.fspath(include_path)
    names = [t for t in tasks if not t.endswith(".yaml")]
    manager = manager_class(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([t]) for t in names):
        manager = manager_class(include_path=folder)  # half a minute: it reads 14,000 task files
    unknown = [t for t in names if not manager.match_tasks([t])]
    if unknown:
        raise ModlabError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}: `lm-eval ls tasks` lists them; a file of "
            "your own is given by its path (.yaml)."
        )
    missing = [t for t in tasks if t.endswith(".yaml") and not os.path.isfile(t)]
    if missing:
        raise ModlabError(f"there is no task file {missing[0]!r}.")
    wrapped = model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with RoutingTally(model) as tally, _bare_assertions_explained(wrapped):
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    scores = {
        task: {
            name.removesuffix(",none"): value
            for name, value in found.items()
            if isinstance(value, (int, float)) and "," in name
        }
        for task, found in results["results"].items()
    }
    return TaskEvaluation(
        scores=scores,
        versions=dict(results.get("versions", {})),
        keep_ratio_by_layer=tally.keep_ratio_by_layer,
        kv_bytes=tally.kv_bytes,
        dense_kv_bytes=tally.dense_kv_bytes,
    )


class RoutingTally:
    """Context manager that sums kept tokens and cache bytes over all forwards of a model, in constant memory.

    Waits for the device after each forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = 0
        self.kept: dict[int, float] = {}
        self.kv_bytes = self.dense_kv_bytes = 0

    def __enter__(self) -> RoutingTally:
        with contextlib.ExitStack() as stack:
            self.recording: Recording | None = None
            if is_converted(self.model):
                self.recording = stack.enter_context(record_routing(self.model))
            stack.callback(self.model.register_forward_hook(self._count).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _count(self, module: Any, args: Any, output: Any) -> None:
        cache = given_cache(output)
        if cache is not None:
            rows = kv_bytes.snapshot(cache)
            self.kv_bytes += sum(row["kv_bytes"] for row in rows)
            self.dense_kv_bytes += sum(row["dense_kv_bytes"] for row in rows)
        for step in self.recording.steps if self.recording else ():
            self.tokens += int(step.real.sum())
            for layer, keep in step.keep.items():
                self.kept[layer] = self.kept.get(layer, 0.0) + float(kept_share(keep).sum())
        if self.recording:
            self.recording.steps.clear()

    @property
    def keep_ratio_by_layer(self) -> dict[int, float]:
        """Share of tokens kept, by routed layer."""
        return {layer: count / max(self.tokens, 1) for layer, count in sorted(self.kept.items())}


@contextlib.contextmanager
def _bare_assertions_explained(wrapped: Any) -> Iterator[None]:
    """The harness asserts, without a word, that an answer fits the context; the user is owed the reason."""
    try:
        yield
    except AssertionError as error:
        if error.args:
            raise
        raise ModlabError(
            "lm-evaluation-harness stopped at a bare assertion, as where an answer is empty or longer "
            f"than the model's context of {wrapped.max_length:,} tokens: leave such documents out."
        ) from error


def _harness() -> tuple[Any, Any, Any]:
    """Evaluator module, TaskManager and HFLM of lm-evaluation-harness."""
    try:
        return (
            importlib.import_module("lm_eval.evaluator"),
            importlib.import_module("lm_eval.tasks").TaskManager,
            importlib.import_module("lm_eval.models.huggingface").HFLM,
        )
    except ImportError as error:
        raise ModlabError(
            f"--tasks needs lm-evaluation-harness, which cannot be imported ({error}): {INSTALL}."
        ) from error
