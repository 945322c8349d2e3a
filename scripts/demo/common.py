"""What the demo scripts share: arguments, where things lie, provenance, export."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # runs from a checkout without installing it

SEQ_LEN = 2048
SHARD = "10MB"  # small enough to copy through anything


def parser(description: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out.add_argument("--out", type=Path, default=REPO / "build" / "demo", help="working folder of all stages")
    return out


def training_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """How long and how: `--minutes` alone makes the schedule follow the clock, with `--steps` it is a cap."""
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument(
        "--minutes", type=float, help="alone: length of the run; with --steps: stop there, resumable"
    )
    parser.add_argument("--batch-size", type=int, default=defaults.get("batch_size", 64), help="rows a step")
    parser.add_argument("--grad-accum", type=int, default=1, help="forwards a step")
    parser.add_argument("--lr", type=float, default=defaults["lr"], help="peak learning rate")
    parser.add_argument(
        "--seed", type=int, default=defaults.get("seed", 0), help="of data order and initialisation"
    )
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-batches", type=int, default=0, help="held-out batches at the end; 0 uses all")


def training_settings(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Those arguments as `TrainConfig` fields."""
    return {
        "out": args.out / "runs" / stage,
        "steps": args.steps,
        "max_minutes": args.minutes,
        "batch_size": args.batch_size,
        "grad_accum": args.grad_accum,
        "lr": args.lr,
        "seed": args.seed,
        "log_every": args.log_every,
        "eval_batches": args.eval_batches,
        "save_every": 500,
        "resume": "auto",
    }


def load_data(out: Path) -> tuple[Any, Any, Any]:
    """(tokenizer, train rows, held-out rows) as `01_tokenizer.py` left them."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    train, heldout = (
        load_from_disk(str(out / "data" / name)).with_format("torch") for name in ("train", "heldout")
    )
    return tokenizer, train, heldout


def fast_matmul() -> None:
    """TF32 for the few fp32 products that autocast leaves."""
    import torch

    torch.set_float32_matmul_precision("high")


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights as bf16 safetensors in small shards (routers stay fp32), with the tokenizer."""
    import torch

    from modlab.saving.atomic import atomic_directory
    from modlab.saving.files import WEIGHT_PATTERNS

    model.to("cpu").to(torch.bfloat16)
    with atomic_directory(folder, replaces=WEIGHT_PATTERNS) as temporary:
        model.save_pretrained(temporary, max_shard_size=SHARD)
        tokenizer.save_pretrained(temporary)
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")


def provenance() -> dict[str, Any]:
    """Command, commit, device, versions, date."""
    import accelerate
    import datasets
    import torch
    import transformers

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "command": shlex.join(["python", *_relative([str(Path(sys.argv[0]).resolve()), *sys.argv[1:]])]),
        "commit": _commit(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_log(out: Path, stage: str, started: float, **values: Any) -> dict[str, Any]:
    """`out`/logs/`stage`.json: the stage's figures, their provenance and its duration."""
    record = {"stage": stage, **values, "seconds": round(time.perf_counter() - started, 1), **provenance()}
    folder = out / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stage}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    return record


def read_log(out: Path, stage: str) -> dict[str, Any]:
    path = out / "logs" / f"{stage}.json"
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: run the stage {stage} first (python scripts/demo/run.py does them in order)."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def held_out(found: Any) -> dict[str, Any]:
    """Figures of a `modlab.measure.Evaluation` for a log."""
    layers = {f"keep_{layer}": kept for layer, kept in found.keep_ratio_by_layer.items()}
    figures = {"loss": found.loss, "tokens": found.predicted_tokens}
    return figures | ({"keep_ratio": found.keep_ratio, **layers} if layers else {})


def training_log(result: Any, config: Any) -> dict[str, Any]:
    """Figures of a run for its log; the curve itself is in runs/<stage>/log.jsonl."""
    last = {k: v for k, v in result.history.iloc[-1].items() if v == v}
    return {
        "stopped": result.stopped,
        "steps": result.steps,
        "tokens": result.tokens,
        "training_seconds": round(result.seconds, 1),
        "tokens_per_s_median": float(result.history["tokens_per_s"].median()),
        "last": last,
        "settings": {k: v for k, v in config.to_dict().items() if k not in ("out", "resume")},
    }


def _relative(argv: list[str]) -> list[str]:
    """Paths below the repository are written from there: a log names no folder of its machine."""
    return [
        str(Path(a).resolve().relative_to(REPO))
        if Path(a).is_absolute() and Path(a).is_relative_to(REPO)
        else a
        for a in argv
    ]


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
