"""Scores of a model on multiple-choice tasks through lm-evaluation-harness, from local .jsonl files.

The first thing to reproduce: what others publish of the dense model. Short prompts say nothing about a routed
cache, as nothing in them is dropped; with `routers` the same documents are asked of the routed model all the
same, which has to change nothing there.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import modlab
from modlab.bench.results import circumstances, source_commit
from modlab.errors import ModlabError
from modlab.integrations.lm_eval import evaluate_tasks

TASKS = {
    "hellaswag": "hellaswag_1000.jsonl",
    "piqa": "piqa.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "arc_challenge": "arc_challenge.jsonl",
}
"""By name, files of lines {"query", "choices", "gold"}; a choice begins with its blank."""


NOTE = "Accuracy of the dense model or of the routed one that was named, as lm-evaluation-harness counts it."


def definition(name: str, documents: Path) -> dict[str, Any]:
    """The task as the harness reads it: the sum of a choice's log-probabilities, and that by its length."""
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }


def run(
    name: str, data: Path, names: list[str], *, limit: int | None = None, batch_size: int = 8, **load: Any
) -> dict[str, Any]:
    """A result file's content: a row a task, with `score` (by length where the task is known by that).

    Args:
        name: what `modlab.load` takes, with `load` (gguf_file, base, dtype).
        data: folder of the files.
        names: some of `TASKS`.
        limit: documents a task; None for all.
    """
    for task in names:
        if task not in TASKS or not (data / TASKS[task]).is_file():
            raise ModlabError(
                f"there is no task {task!r} in {str(data)!r}: choose some of {', '.join(TASKS)}."
            )
    model, tokenizer = modlab.load(name, **load)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for task in names:
            files.append(str(Path(folder, f"{task}.yaml")))
            Path(files[-1]).write_text(json.dumps(definition(task, data / TASKS[task])), encoding="utf-8")
        found = evaluate_tasks(model, tokenizer, files, limit=limit, batch_size=batch_size)
    rows = [{"task": task, **found.scores[f"local_{task}"]} for task in names]
    return {
        "what": "real_tasks",
        "model": Path(name).name,
        "limit": limit,
        "note": NOTE,
        "commit": source_commit(),
        **circumstances(model.device, model.dtype),
        "keep_ratio": found.keep_ratio,
        "rows": rows,
    }
