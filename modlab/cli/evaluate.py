"""`modlab eval`: loss, keep ratio and KV saving on held-out text, or scores of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import Any

from modlab.cli.flags import Command, add_kv_cache_dtype, read_name
from modlab.cli.models import (
    add_data_flags,
    add_model_flags,
    launched,
    load_model,
    rows_of,
    store_as_asked,
    stored_as,
)
from modlab.errors import ModlabError


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command("eval", run, "measure held-out loss, keep ratio of each layer and KV saving")
    sub.add_argument("model", metavar="MODEL", type=read_name, help="model to measure, dense or converted")
    add_data_flags(sub, required=False, tokens=65536)
    sub.add_argument(
        "--split",
        choices=("heldout", "train", "all"),
        help="which documents of the source (default: heldout; all for a local file or folder)",
    )
    tasks = sub.add_argument_group("scores of lm-evaluation-harness, instead of --data")
    tasks.add_argument(
        "--tasks", metavar="NAME[,NAME]", help="tasks that the harness knows, or task files (.yaml)"
    )
    tasks.add_argument("--include-path", metavar="DIR", type=read_name, help="folder with more task files")
    tasks.add_argument("--limit", metavar="N", type=int, help="documents a task")
    tasks.add_argument("--num-fewshot", metavar="K", type=int, help="examples in the prompt")
    tasks.add_argument("--batch-size", metavar="B", type=int, default=1, help="rows a forward")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_kv_cache_dtype(sub, "keys and values of routed layers")
    add_model_flags(sub)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    if bool(options.data) == bool(options.tasks):
        raise ModlabError("what to measure on? Give --data SOURCE or --tasks NAME, one of them.")
    return _run_tasks(options) if options.tasks else _run_data(options)


def _run_tasks(options: argparse.Namespace) -> int:
    from modlab.bench.results import circumstances
    from modlab.integrations.lm_eval import evaluate_tasks

    if launched() is not None:
        raise ModlabError("--tasks runs in one process: start it without accelerate launch.")
    model, tokenizer = load_model(options, options.model)
    store_as_asked(options, model)
    result = evaluate_tasks(
        model,
        tokenizer,
        options.tasks.split(","),
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
    )
    facts = {"model": options.model, "keep_ratio": result.keep_ratio, "kv_saving": result.kv_saving}
    facts |= stored_as(model)
    if options.json:
        layers = [{"layer": i, "keep_ratio": kept} for i, kept in result.keep_ratio_by_layer.items()]
        command = {"command": shlex.join(["modlab", *sys.argv[1:]])}
        scores = {"scores": result.scores, "task_versions": result.versions}
        where = circumstances(model.device, model.dtype)
        print(json.dumps(facts | scores | {"layers": layers} | command | where, indent=2))
        return 0
    width = max(len(task) for task in result.scores)
    for task, metrics in result.scores.items():
        for metric, value in metrics.items():
            print(f"{task:<{width}}  {metric:<18} {value:,.4f}")
    print(
        f"\nkeep_ratio {result.keep_ratio:.4f}, kv_saving {result.kv_saving:.4f}, over all of their forwards"
    )
    return 0


def _run_data(options: argparse.Namespace) -> int:
    import modlab
    from modlab import measure
    from modlab.bench.results import circumstances

    model, tokenizer = load_model(options, options.model)
    store_as_asked(options, model)
    rows = rows_of(options, model, tokenizer)
    result = measure.evaluate(model, rows, seq_len=rows.seq_len, accelerator=launched())
    facts: dict[str, Any] = {
        "model": options.model,
        "data": options.data,
        "split": rows.split,
        "seq_len": rows.seq_len,
        "predicted_tokens": result.predicted_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "keep_ratio": result.keep_ratio,
        "kv_bytes": result.kv_bytes,
        "dense_kv_bytes": result.dense_kv_bytes,
        "kv_saving": result.kv_saving,
        **stored_as(model),
    }
    layers = [
        {"layer": layer, "threshold": model.mod.thresholds[layer], "keep_ratio": kept}
        for layer, kept in result.keep_ratio_by_layer.items()
    ]
    if options.json:
        command = {"command": shlex.join(["modlab", *sys.argv[1:]])}
        print(
            json.dumps(
                facts | {"layers": layers} | command | circumstances(model.device, model.dtype), indent=2
            )
        )
        return 0
    for name, value in facts.items():
        print(f"{name:<17} {value:,.4f}" if isinstance(value, float) else f"{name:<17} {value}")
    if modlab.is_converted(model):
        print(f"\n{'layer':>5} {'threshold':>9} {'kept':>6}")
        for row in layers:
            print(f"{row['layer']:>5} {row['threshold']:>9.3f} {row['keep_ratio']:>6.1%}")
    else:
        print("\nno routed layers: the model is dense")
    return 0
