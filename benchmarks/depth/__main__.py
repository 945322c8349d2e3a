"""python -m benchmarks.depth STAGE"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.depth.arms import PROJECTION_RATE


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs the stage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depth", description="Less compute a token on real models."
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    run = stages.add_parser("run", help="convert, distil, measure")
    run.add_argument(
        "--arms", required=True,
        help="names with commas between them, `arms` lists them; NAME@SECONDS cuts one distillation",
    )  # fmt: skip
    run.add_argument("--data", type=Path, required=True, help="what benchmarks.real_models texts wrote")
    run.add_argument("--questions", type=Path, help="folder of the tasks' jsonl files")
    run.add_argument("--items", type=int, default=1000, help="of each task")
    run.add_argument("--humaneval", type=int, default=0, metavar="N", help="problems of it; 0: none")
    run.add_argument("--measured", type=int, default=8, help="rows of each text")
    run.add_argument("--tokens", type=float, default=10, help="millions, of distillation; 0 for none")
    run.add_argument("--length", type=int, default=4096, help="of a training row")
    run.add_argument("--rows", type=int, default=2, help="of a forward")
    run.add_argument("--batch", type=int, default=32_768, help="tokens of a step")
    run.add_argument("--rate", type=float, default=PROJECTION_RATE, help="of projections, at its peak")
    run.add_argument("--minutes", type=float, help="cut each distillation to this")
    run.add_argument("--start", help="K/V routers that arms named started begin with (default: shipped ones)")
    run.add_argument("--timed", type=int, default=0, metavar="N", help="time a prompt and N tokens more")
    run.add_argument("--seed", type=int, default=0)
    prefill = stages.add_parser("prefill", help="time prompts through generate")
    prefill.add_argument("--repeats", type=int, default=5)
    prefill.add_argument("--decode", type=int, default=0, metavar="N", help="tokens after the first")
    prefill.add_argument(
        "--routers", help="K/V routers, a folder or some that ship, that decide; drawn decisions without"
    )
    prefill.add_argument("--saving", type=float, default=4.0, help="K/V saving that these aim at")
    prefill.add_argument("--data", type=Path, help="what benchmarks.real_models texts wrote, for --routers")
    prefill.add_argument("--text", default="wikitext", help="of it that prompts are taken from")
    profile = stages.add_parser("profile", help="where the time of a prompt goes, by kernel")
    for stage in (prefill, profile):
        stage.add_argument("--lengths", default="32768")
        stage.add_argument("--leave-after", type=float, default=2 / 3)
        stage.add_argument("--shape", help="random weights of a shape of modlab.bench, such as llama-3-8b")
    report = stages.add_parser("report", help="what runs have left, as one result file")
    report.add_argument("--runs", type=Path, nargs="+", required=True, help="their folders")
    report.add_argument("--origin", type=Path, help="origin.json of a run; by default the first run's")
    classes = stages.add_parser(
        "classes", help="which kinds of tokens routers keep, and what each kind loses"
    )
    classes.add_argument("--routers", required=True, help="a folder, or some that ship")
    classes.add_argument("--saving", type=float, help="K/V saving whose threshold is set, if they know it")
    classes.add_argument("--data", type=Path, required=True, help="what benchmarks.real_models texts wrote")
    classes.add_argument("--texts", default="novels,python,wikitext,headers")
    classes.add_argument("--measured", type=int, default=2, help="rows of each text")
    stages.add_parser("arms", help="list the arms")
    for stage in (run, prefill, profile, classes):
        stage.add_argument("--model", type=Path, required=stage in (run, classes), help="the model's folder")
        stage.add_argument("--device", default="cuda")
        stage.add_argument("--commit", help="of the source tree, where git cannot be asked")
    for stage in (run, prefill, profile, report, classes):
        stage.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.argv = sys.argv[1:] if arguments is None else arguments
    {
        "run": _run,
        "prefill": _prefill,
        "profile": _profile,
        "classes": _classes,
        "report": _report,
        "arms": _arms,
    }[options.stage](options)


def _arms(options: argparse.Namespace) -> None:
    from benchmarks.depth.arms import ARMS

    print("\n".join(ARMS))


def _run(options: argparse.Namespace) -> None:
    from benchmarks.depth.arms import arm_named
    from benchmarks.depth.distil import Plan
    from benchmarks.depth.run import Study
    from benchmarks.real_models.texts import Data

    given = [name.partition("@")[::2] for name in options.arms.split(",")]
    for name, _ in given:
        arm_named(name)
    study = Study(
        options.model, options.device, Data.load(options.data), options.out,
        options.questions, options.items, options.measured, options.start,
        options.humaneval, options.timed,
    )  # fmt: skip
    _write_origin(options)
    plan = Plan(
        int(options.tokens * 1e6), options.length, options.rows, options.batch, seed=options.seed,
        rate=options.rate,
    )  # fmt: skip
    failed: list[str] = []
    for name, cut in given:
        if study.done(name, plan.seed):
            study.say(f"{name} is there already")
            continue
        seconds = float(cut) if cut else options.minutes and 60 * options.minutes
        try:
            study.run(name, plan, seconds)
        except Exception:  # the arms behind it are worth as much
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _prefill(options: argparse.Namespace) -> None:
    from benchmarks.depth.prefill import Real, time_prompts
    from benchmarks.real_models.texts import Data
    from modlab.errors import ModlabError

    real = None
    if options.routers:
        if options.data is None:
            raise ModlabError("--routers decide about real text: give --data too.")
        real = Real(options.routers, options.saving, Data.load(options.data), options.text)
    lengths, name, model = _timed_model(options)
    _write_origin(options)
    with (options.out / "prefill.jsonl").open("a") as file:
        rows = time_prompts(
            model, lengths, options.repeats, options.leave_after, decode=options.decode, real=real
        )
        for row in rows:
            file.write(json.dumps({"model": name, **row}) + "\n")
            print(name, row, flush=True)


def _profile(options: argparse.Namespace) -> None:
    from benchmarks.depth.profile import profile_prompts

    lengths, name, model = _timed_model(options)
    _write_origin(options)
    with (options.out / "profile.jsonl").open("a") as file:
        for length in lengths:
            for row in profile_prompts(model, length, options.leave_after):
                file.write(json.dumps({"model": name, **row}) + "\n")
                kernels = row.pop("kernels")
                print(name, row, *(f"\n    {k['ms']:9.3f} ms {k['count']:5} {k['name']}" for k in kernels))


def _classes(options: argparse.Namespace) -> None:
    import modlab
    from benchmarks.depth.classes import losses_by_class
    from benchmarks.real_models.run import rounded
    from benchmarks.real_models.texts import Data

    loaded: Any = modlab.load(options.routers, base=str(options.model))
    model, tokenizer = loaded
    model.to(options.device).eval()
    if options.saving:
        modlab.set_kv_saving(model, options.saving)
    _write_origin(options)
    origin = json.loads((options.out / "origin.json").read_text(encoding="utf-8"))
    rows = losses_by_class(
        model, tokenizer, Data.load(options.data), options.texts.split(","), options.measured
    )
    said = {"model": options.model.name, "routers": Path(options.routers).name, "saving": options.saving}
    said |= {"skip": model.mod.config.skip, **rounded({"rows": rows})}
    (options.out / "classes.json").write_text(
        json.dumps({"what": "classes", **origin, **said}, indent=1) + "\n"
    )


def _timed_model(options: argparse.Namespace) -> tuple[list[int], str, Any]:
    """Lengths of prompts, the model's name and the model."""
    import torch

    from benchmarks.depth.model import load

    lengths = [int(length) for length in options.lengths.split(",")]
    if options.shape:
        from transformers import AutoModelForCausalLM

        from modlab.bench.models import SHAPES

        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        config = SHAPES[options.shape].config(max(lengths) + 1)
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        model = load(options.model, options.device)
    return lengths, options.shape or options.model.name, model


def _write_origin(options: argparse.Namespace) -> None:
    import torch

    from modlab.bench.results import circumstances, source_commit

    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    paths = [value for value in vars(options).values() if isinstance(value, Path)]
    routers = (vars(options).get("start"), vars(options).get("routers"))  # a folder, or a name
    hidden = {str(value): Path(value).name for value in (*paths, *routers) if value is not None}
    said = [hidden.get(word, word) for word in options.argv]
    origin: dict[str, Any] = {
        **circumstances(device, dtype),
        "commit": options.commit or source_commit(),
        "command": shlex.join(["python", "-m", "benchmarks.depth", *said]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "origin.json").write_text(json.dumps(origin, indent=1) + "\n")


def _report(options: argparse.Namespace) -> None:
    from benchmarks.depth.report import result

    path = options.origin or options.runs[0] / "origin.json"
    origin = json.loads(path.read_text(encoding="utf-8"))
    options.out.write_text(json.dumps(result(options.runs, origin), indent=1) + "\n")


if __name__ == "__main__":
    main()
