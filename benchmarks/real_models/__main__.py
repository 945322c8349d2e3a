"""python -m benchmarks.real_models STAGE"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ARMS = {"auto": "distil", "int8": "distil-int8", "k6v4": "distil-k6v4"}
"""What distilled routers are called, by how keys and values are stored."""


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs the stage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_models", description="K/V routing on real models."
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    texts = stages.add_parser("texts", help="tokenise, on a machine that has the texts")
    texts.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    texts.add_argument(
        "--novels", type=Path, required=True, help="folder with train/ and heldout/ of .txt files"
    )
    texts.add_argument("--wikitext", type=Path, required=True)
    texts.add_argument("--length", type=int, default=8192, help="of evaluation rows")
    texts.add_argument("--tokens", type=float, default=28, help="millions of training tokens")
    texts.add_argument("--probe-rows", type=int, default=50)
    run = stages.add_parser("run", help="fit, distil, measure")
    run.add_argument("--arms", default="", help="names with commas between them")
    run.add_argument("--gates", type=Path, nargs="*", default=[], help="gates to measure, without training")
    run.add_argument("--tokens", type=float, default=30, help="millions, of distillation")
    run.add_argument("--minutes", type=float, help="cut each distillation to this")
    run.add_argument("--ratios", default="2,4,8,16")
    run.add_argument("--controls", default="", help="ratios at which controls are measured too")
    run.add_argument("--set", nargs="*", default=[], help="fields of the plan, as in rate=0.002")
    run.add_argument("--seed", type=int, default=0)
    speed = stages.add_parser("speed", help="kernel against reference, times, tokens a second")
    speed.add_argument("--arm", default="head")
    speed.add_argument("--steps", type=int, default=20)
    speed.add_argument("--profile", action="store_true")
    for stage in (run, speed):
        stage.add_argument("--model", type=Path, required=True, help="the model's folder")
        stage.add_argument("--data", type=Path, required=True, help="what `texts` wrote")
        stage.add_argument("--device", default="cuda")
    trains = stages.add_parser("train-speed", help="of the product: fitting, distilling, peak memory")
    trains.add_argument(
        "--model", type=Path, help="the model's folder; random weights of an 8B shape without"
    )
    trains.add_argument("--device", default="cuda")
    trains.add_argument("--batch", type=int, default=8, help="rows a forward")
    trains.add_argument("--length", type=int, default=4096, help="tokens a row")
    trains.add_argument("--steps", type=int, default=20)
    trains.add_argument("--accumulate", type=int, default=1, help="forwards a step")
    trains.add_argument("--checkpointing", action="store_true", help="of gradients")
    trains.add_argument("--compile", action="store_true", help="layers, by torch.compile")
    trains.add_argument("--anneal", action="store_true", help="no rows with thresholds of their own")
    quick = stages.add_parser("quick", help="fit routers by the recipe of that name; how long it takes")
    quick.add_argument(
        "--model", type=Path, help="the dense model's folder; random weights of an 8B shape without"
    )
    quick.add_argument("--texts", help="what routers are fitted to, as for modlab fit --data")
    quick.add_argument("--repeats", type=int, default=2, help="fits that are timed; the first compiles")
    quick.add_argument("--fit-tokens", type=int, help="of text (default: as modlab fit)")
    quick.add_argument("--context", type=int, help="tokens of a text (default: as modlab fit)")
    quick.add_argument("--commit", help="of the source tree, where git cannot be asked")
    quick.add_argument("--device", default="cuda")
    report = stages.add_parser("report", help="what runs have left, as one result file")
    report.add_argument("--runs", type=Path, nargs="+", required=True, help="their folders")
    report.add_argument(
        "--origin", type=json.loads, required=True, help="JSON: date, device_name, commit, ..."
    )
    ship = stages.add_parser("ship", help="packed gates as routers that ship with modlab")
    ship.add_argument("--gates", type=Path, required=True, help="packed, with their card next to them")
    ship.add_argument("--base", type=Path, required=True, help="folder of the model that they are for")
    ship.add_argument("--hub-id", required=True, help="where others get that model")
    tasks = stages.add_parser(
        "tasks", help="multiple-choice tasks of lm-evaluation-harness, from .jsonl files"
    )
    tasks.add_argument("--model", required=True, help="as for modlab.load")
    tasks.add_argument("--gguf-file", help="of the folder")
    tasks.add_argument("--base", type=Path, help="of routers alone")
    tasks.add_argument("--data", type=Path, required=True, help="folder of the .jsonl files")
    tasks.add_argument("--tasks", default="hellaswag,piqa,arc_easy,arc_challenge")
    tasks.add_argument("--limit", type=int, help="documents a task")
    measure = stages.add_parser("measure", help="all rows of the table, by the product's cache; resumable")
    measure.add_argument("--model", type=Path, required=True, help="folder of the base, or converted")
    measure.add_argument("--routers", type=Path, help="folder of the routers, where --model is the base")
    measure.add_argument("--data", type=Path, required=True, help="what `texts` wrote")
    measure.add_argument("--questions", type=Path, help="folder of the evaluation sets")
    measure.add_argument("--savings", default="2,4,8,16", help="one may come again with other --recent")
    measure.add_argument(
        "--recent",
        default="",
        help="latest tokens that stay anyway, a number for each of --savings (default: as trained)",
    )
    measure.add_argument("--only", default="", help="kinds of pieces, with commas between them")
    measure.add_argument("--minutes", type=float, help="begin no piece after so many")
    measure.add_argument(
        "--kv-cache-dtype", choices=list(ARMS), default="auto", help="as of MoDConfig; of controls, too"
    )
    measure.add_argument(
        "--arm",
        help="what the routers are called in the results (default: distil, with a type distil-TYPE)",
    )
    measure.add_argument("--tokens", type=float, default=0, help="millions, that the routers were trained on")
    measure.add_argument("--seed", type=int, default=0, help="of their training")
    measure.add_argument("--commit", help="of the source tree, where git cannot be asked")
    measure.add_argument("--device", default="cuda")
    measure.add_argument(
        "--dense", type=Path, help="file of the dense side, which processes and arms of a model share"
    )
    measure.add_argument("--slow", action="store_true", help="generate without fast generation")
    measure.add_argument("--sizes", type=json.loads, default={}, help="JSON: fields of work.Sizes")
    recent = stages.add_parser("recent", help="recent tokens against gated ones at equal bytes, on one text")
    recent.add_argument("--model", type=Path, required=True, help="folder of the base, or converted")
    recent.add_argument("--routers", type=Path, help="of the routers, where --model is the base")
    recent.add_argument("--text", type=Path, nargs="+", required=True, help="files, joined in order")
    recent.add_argument("--length", type=int, default=8192, help="tokens of a row")
    recent.add_argument("--savings", default="2,4")
    recent.add_argument("--recent", default="", help="latest tokens that stay anyway (default: as shipped)")
    recent.add_argument("--distances", default="", help="of repeated passages, measured too")
    recent.add_argument("--passages", type=int, default=8, help="of each distance")
    recent.add_argument("--device", default="cpu")
    join = stages.add_parser("join", help="what `measure` left, as one result file")
    join.add_argument("--run", type=Path, required=True, help="its folder")
    join.add_argument("--note", default="", help="what else is to be said of the figures")
    budget = stages.add_parser("budget", help="what a larger budget would give, from a distillation's log")
    budget.add_argument("--log", type=Path, required=True, help="log.jsonl of a run with --eval-every")
    budget.add_argument("--keep-ratio", type=float, default=0.25, help="that the run was asked for")
    budget.add_argument("--tokens", default="60,120,240", help="millions, with commas between them")
    for stage in (texts, run, report, ship, tasks, measure, recent, join, quick):
        stage.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    verbs = {
        "texts": _texts,
        "run": _run,
        "speed": _speed,
        "train-speed": _train_speed,
        "quick": _quick,
        "report": _report,
        "ship": _ship,
        "tasks": _tasks,
        "measure": _measure,
        "recent": _recent,
        "join": _join,
        "budget": _budget,
    }
    verbs[options.stage](options)


def _texts(options: argparse.Namespace) -> None:
    from benchmarks.real_models.texts import prepare

    data = prepare(
        options.tokenizer, options.novels, options.wikitext, options.length,
        int(options.tokens * 1e6), options.probe_rows,
    )  # fmt: skip
    data.save(options.out)
    print(
        f"{len(data.stream):,} training tokens; {', '.join(f'{n} {r.shape}' for n, r in data.texts.items())}"
    )


def _run(options: argparse.Namespace) -> None:
    from benchmarks.real_models import base, pack
    from benchmarks.real_models.run import Study, known_arm
    from benchmarks.real_models.texts import Data

    names = [name for name in options.arms.split(",") if name]
    for name in names:
        known_arm(name)
    data = Data.load(options.data)
    study = Study(
        options.model.name, base.load(options.model, options.device), data, options.out, options.seed
    )
    ratios = [float(ratio) for ratio in options.ratios.split(",") if ratio]
    checked = [float(ratio) for ratio in options.controls.split(",") if ratio]
    changes = {name: json.loads(value) for name, value in (item.split("=") for item in options.set)}
    for name in names:
        gates = study.train(name, int(options.tokens * 1e6), options.minutes, **dict(changes))
        study.measure(name, gates, ratios, checked, int(options.tokens * 1e6))
    for path in options.gates:
        gates = pack.load(path).to(options.device)
        study.measure(path.stem.removeprefix("gates_"), gates, ratios, checked, int(options.tokens * 1e6))


def _speed(options: argparse.Namespace) -> None:
    from benchmarks.real_models import base, speed
    from benchmarks.real_models.texts import Data

    model = base.load(options.model, options.device)
    shape = model.shape
    print(
        "kernel against reference", speed.check_kernel(options.device, shape.N, shape.G, shape.H), flush=True
    )
    print("ms", speed.time_kernel(8, 4096, shape.N, shape.G, shape.H), flush=True)
    data = Data.load(options.data)
    found = speed.training_speed(model, data, options.arm, options.steps, options.profile)
    print(f"{found:,.0f} tokens a second", flush=True)


def _train_speed(options: argparse.Namespace) -> None:
    from benchmarks.real_models import training_speed

    found = training_speed.measure(
        training_speed.load(options.model, options.device), batch=options.batch, length=options.length,
        steps=options.steps, accumulate=options.accumulate, checkpointing=options.checkpointing,
        mixed=not options.anneal, compiled=options.compile,
    )  # fmt: skip
    print(json.dumps(found), flush=True)


def _quick(options: argparse.Namespace) -> None:
    from benchmarks.real_models import quick

    found = quick.run(
        options.model, options.texts, options.out, options.device, repeats=options.repeats,
        tokens=options.fit_tokens, context=options.context, commit=options.commit,
    )  # fmt: skip
    print(json.dumps(found["rows"][0]), flush=True)


def _report(options: argparse.Namespace) -> None:
    from benchmarks.real_models.report import result

    options.out.write_text(json.dumps(result(options.runs, options.origin), indent=1) + "\n")


def _ship(options: argparse.Namespace) -> None:
    from benchmarks.real_models.ship import ship

    ship(options.gates, options.base, options.hub_id, options.out)


def _tasks(options: argparse.Namespace) -> None:
    from benchmarks.real_models import tasks

    load = {"gguf_file": options.gguf_file, "base": options.base, "dtype": "float32"}
    given = {name: value for name, value in load.items() if value is not None}
    result = tasks.run(options.model, options.data, options.tasks.split(","), limit=options.limit, **given)
    result["command"] = (
        f"python -m benchmarks.real_models tasks --model {Path(options.model).name} --tasks {options.tasks}"
        + (f" --limit {options.limit}" if options.limit else "")
    )
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _measure(options: argparse.Namespace) -> None:
    from benchmarks.real_models.measured.run import run

    arm = options.arm or ARMS[options.kv_cache_dtype]
    run(
        options.model, options.routers, options.data, options.questions, options.out,
        [float(saving) for saving in options.savings.split(",")],
        tuple(kind for kind in options.only.split(",") if kind),
        recent=[int(tokens) for tokens in options.recent.split(",") if tokens] or None,
        about={"arm": arm, "tokens": round(options.tokens * 1e6), "seed": options.seed},
        commit=options.commit, device=options.device, fast=not options.slow,
        minutes=options.minutes, sizes=options.sizes, dense=options.dense,
        kv_cache_dtype=options.kv_cache_dtype,
    )  # fmt: skip


def _recent(options: argparse.Namespace) -> None:
    from benchmarks.real_models.measured import recent
    from benchmarks.real_models.measured.product import Product

    product = Product.load(options.model, options.routers, options.device, fast=False)
    savings, recents, distances = (
        [float(number) for number in given.split(",") if number]
        for given in (options.savings, options.recent, options.distances)
    )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in options.text]
    lines = recent.run(
        product, texts, options.length, savings, [int(n) for n in recents],
        tuple(int(n) for n in distances), options.passages,
    )  # fmt: skip
    with options.out.open("w", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(line), file=file, flush=True)


def _join(options: argparse.Namespace) -> None:
    from benchmarks.real_models.measured.join import joined

    found = joined(options.run) | ({"note": options.note} if options.note else {})
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _budget(options: argparse.Namespace) -> None:
    from benchmarks.real_models.budget import fit, said

    tokens = [1e6 * float(count) for count in options.tokens.split(",")]
    print(said(fit(options.log, options.keep_ratio), tokens))


if __name__ == "__main__":
    main()
