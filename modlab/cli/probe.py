"""`modlab probe`: recall, retrieval and generation health, which a mean loss hides."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from typing import Any

from modlab.cli.flags import Command, add_kv_cache_dtype, read_integers, read_name
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

PROBES = ("recall", "retrieval", "generation")


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command(
        "probe",
        run,
        "measure what a mean loss hides: long-range recall, retrieval, generated text",
        "Run it on the converted model and on the dense one, with the same flags: both get the same rows, "
        "and the differences are what conversion costs.",
    )
    sub.add_argument("model", metavar="MODEL", type=read_name, help="model to measure, dense or converted")
    add_data_flags(sub, required=True, tokens=65536, rows=False)
    sub.add_argument(
        "--split",
        choices=("heldout", "train", "all"),
        help="which documents of the source (default: heldout; all for a local file or folder)",
    )
    sub.add_argument(
        "--only", choices=PROBES, nargs="+", default=[], help="some of the probes (default: all)"
    )
    sub.add_argument(
        "--judge",
        metavar="MODEL",
        type=read_name,
        help="dense model of the same tokenizer that rates the generated text",
    )
    far = sub.add_argument_group("recall and retrieval")
    far.add_argument(
        "--distances",
        metavar="D,D",
        type=read_integers,
        help="tokens (default: those of 256,512,1024,2048,4000 that the context has room for)",
    )
    far.add_argument("--rows", metavar="N", type=int, default=64, help="passages, or questions, a distance")
    far.add_argument("--passage", metavar="T", type=int, default=64, help="tokens of a repeated passage")
    far.add_argument("--pairs", metavar="N", type=int, default=8, help="names and values in a row")
    far.add_argument(
        "--by-row", action="store_true", help="a line a row instead of means, for paired comparisons"
    )
    text = sub.add_argument_group("generation")
    text.add_argument("--prompts", metavar="N", type=int, default=32, help="prompts to continue")
    text.add_argument("--prompt-tokens", metavar="T", type=int, default=128, help="tokens of a prompt")
    text.add_argument("--new-tokens", metavar="T", type=int, default=256, help="most tokens to write")
    text.add_argument("--temperature", metavar="X", type=float, default=1.0, help="of the sampled text")
    sub.add_argument(
        "--paired",
        action="store_true",
        help="recall and retrieval of a converted MODEL next to its dense self (routing off), with the "
        "standard error of the difference",
    )
    sub.add_argument("--seed", metavar="S", type=int, default=0, help="of places, values and samples")
    sub.add_argument("--batch-size", metavar="B", type=int, default=8, help="rows a forward")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_kv_cache_dtype(sub, "keys and values of routed layers")
    add_model_flags(sub)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab import probes
    from modlab.bench.results import circumstances
    from modlab.routing.state import routing_of

    chosen = [name for name in PROBES if name in options.only] if options.only else list(PROBES)
    if options.judge and "generation" not in chosen:
        raise ModlabError("--judge rates generated text, and --only leaves generation out: drop one of them.")
    if options.paired and options.by_row:
        raise ModlabError("--paired gives means of differences, --by-row single rows: drop one of them.")
    model, tokenizer = load_model(options, options.model)
    store_as_asked(options, model)
    if options.paired:
        routing_of(model)  # a dense model is refused before data are read
    judge = _judge(options, tokenizer) if options.judge else None
    rows = rows_of(options, model, tokenizer)
    data = list(rows)
    shared = {"seed": options.seed, "batch_size": options.batch_size, "accelerator": launched()}
    far: dict[str, Any] = {"rows": options.rows, "by_row": options.by_row, **shared}
    if options.distances:
        far["distances"] = options.distances
    facts: dict[str, Any] = {"model": options.model, "data": options.data, "split": rows.split}
    facts |= stored_as(model)
    tables: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*distances left out")  # printed below
        if "recall" in chosen:
            recall = probes.recall_gap if options.paired else probes.recall
            tables["recall"] = recall(model, data, passage=options.passage, **far)
        if "retrieval" in chosen:
            retrieval = probes.retrieval_gap if options.paired else probes.retrieval
            tables["retrieval"] = retrieval(model, data, tokenizer, pairs=options.pairs, **far)
    health = None
    if "generation" in chosen:
        health = probes.generation_health(
            model,
            data,
            judge=judge,
            prompts=options.prompts,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            temperature=options.temperature,
            **shared,
        )
    if options.json:
        made = circumstances(model.device, model.dtype)
        print(json.dumps(_as_json(options, facts, tables, health) | made, indent=2))
    else:
        _print(tables, health)
    return 0


def _as_json(
    options: argparse.Namespace, facts: dict[str, Any], tables: dict[str, Any], health: Any
) -> dict[str, Any]:
    """The facts with all rows of the tables, and the command that made them."""
    for name, table in tables.items():
        facts[name] = table.astype(object).where(table.notna(), None).to_dict("records")
        facts[f"{name}_left_out"] = table.attrs["left_out"]
    if health is not None:
        facts |= {"generation": health.to_dict(), "judge": options.judge}
    return facts | {"command": shlex.join(["modlab", *sys.argv[1:]])}


def _print(tables: dict[str, Any], health: Any) -> None:
    for name, table in tables.items():
        print(f"{name}\n{table.to_string(index=False, float_format=_figure)}")
        for distance, reason in table.attrs["left_out"].items():
            print(f"distance {distance:,} left out: {reason}")
        print()
    if health is not None:
        print(f"generation\n{health.frame().T.to_string(float_format=_figure)}")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def _judge(options: argparse.Namespace, tokenizer: Any) -> Any:
    judge, its_tokenizer = load_model(options, options.judge)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModlabError(
            f"--judge {options.judge} has another tokenizer than {options.model}: it cannot rate its tokens."
        )
    return judge
