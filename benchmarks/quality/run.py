"""One arm from the base to its JSON file; many arms, on as many GPUs as there are."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import corpus as corpora
from benchmarks.quality.arms import ARMS, Arm
from benchmarks.quality.base import load_base
from benchmarks.quality.mechanisms import MECHANISMS
from benchmarks.quality.scale import Scale
from benchmarks.quality.score import loss_of, score
from modlab.bench.results import circumstances, source_commit
from modlab.execution.routed import compiled_forward
from modlab.saving.save import save_routers
from modlab.skips import named

KEPT_LOG = ("step", "tokens", "loss", "keep_ratio", "target", "objective", "kl", "tokens_per_s")


def run_name(arm: str, tokens: int, seed: int) -> str:
    """Name of a run's files."""
    return f"{arm}-{tokens // 1_000_000}M-s{seed}" if tokens >= 1_000_000 else f"{arm}-{tokens}-s{seed}"


def run_arm(
    scale: Scale,
    arm: Arm,
    tokens: int,
    seed: int,
    work: Path,
    results: Path,
    deep: bool,
    compile: bool,
    commit: str | None,
) -> None:
    """Converts the base as the arm says, trains it, scores it, writes `results`/<name>.json."""
    import modlab
    from modlab.training.loop import TrainConfig, train

    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    corpus = corpora.load(scale, work / "corpus")
    model, base = load_base(work / "base", device), load_base(work / "base", device)
    config = arm.config(scale.layers)
    name = run_name(arm.name, tokens, seed)
    with contextlib.ExitStack() as stack:
        fields = arm.training(scale.layers, scale.seq_len)
        if config is not None:
            modlab.convert(model, config)
        if arm.mechanism is not None:
            stack.enter_context(MECHANISMS[arm.mechanism](model, fields.get("keep_ratio", 1.0)))
        settings = TrainConfig(
            **{
                "out": work / "runs" / name,
                "resume": "auto",
                "save_every": 1000,
                "keep_last": 1,
                "tokens": tokens,
                "batch_size": scale.batch_size,
                "lr": scale.lr,
                "warmup": 0.02,
                # They cost thrice a packed step at this length; where all tokens run anyway, little more.
                "what_if": 1.0 if config is not None and named(config.skip).runs_all else 0.25,
                "seed": seed,
                "kl": arm.teacher,
                "log_every": 20,
                "compile": compile and device == "cuda" and arm.mechanism is None,
                **fields,
            }
        )
        result = train(model, corpus.train, settings, teacher=base if arm.teacher else None)
        if result.stopped != "finished":
            raise KeyboardInterrupt(f"{name} was {result.stopped}; the same command goes on with it")
        if settings.freeze_base:  # a few KB, on which all else of the model follows from the base
            save_routers(model, work / "routers" / name, scale.shipped or "the study's base")
        trained = time.perf_counter()
        points = score(model, arm, corpus, scale, base, deep, device)
        base_loss = loss_of(base, corpus, scale, device) if settings.freeze_base else None
    record = {
        "arm": arm.name,
        "why": arm.why,
        "seed": seed,
        "tokens": result.tokens,
        "scale": scale.name,
        "mod": None if config is None else config.to_dict(),
        "train": {k: v for k, v in settings.to_dict().items() if k not in ("out", "resume")},
        "mechanism": arm.mechanism,
        "asked_kv_saving": None if arm.keep_ratio else arm.kv_saving,
        "asked_keep_ratio": fields.get("keep_ratio"),
        "points": points,
        "base_loss": base_loss,
        "history": [
            {k: row[k] for k in KEPT_LOG if row.get(k) == row.get(k) and k in row}
            for row in result.history.to_dict("records")
        ],
        "training_seconds": round(result.seconds, 1),
        "scoring_seconds": round(time.perf_counter() - trained, 1),
        "seconds": round(time.perf_counter() - started, 1),
        **provenance(device, commit),
    }
    results.mkdir(parents=True, exist_ok=True)
    temporary = results / f".{name}.tmp"
    temporary.write_text(json.dumps(record) + "\n")
    os.replace(temporary, results / f"{name}.json")
    best = points[0]
    print(
        f"{name}: loss {best['loss']:.4f} at {best['kv_saving']:.2f}x, keep {best['keep_ratio']:.3f}, "
        f"FLOPs {best['flops_share']:.2f}, {record['seconds']:.0f} s",
        flush=True,
    )


def run_arms(
    scale: Scale,
    names: Sequence[str],
    tokens: int,
    seeds: Sequence[int],
    work: Path,
    results: Path,
    deep: bool,
    minutes: float | None,
    compile: bool,
    commit: str | None,
    per_gpu: int = 1,
) -> None:
    """Runs every arm that has no result yet; several GPUs, or processes on one GPU, take arms in turn.

    Args:
        minutes: no arm is begun that would, by the time of the one before, end later than this.
        per_gpu: processes that share a GPU; one computes while another compiles, loads or waits.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise SystemExit(f"no arm {unknown[0]!r}: there are {', '.join(ARMS)}.")
    claims = work / "claims"
    gpus = _visible_gpus() * per_gpu
    if len(gpus) > 1 and "QUALITY_WORKER" not in os.environ:
        for claim in claims.glob("*"):
            claim.unlink()
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:]],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "QUALITY_WORKER": str(i)},
            )
            for i, gpu in enumerate(gpus)
        ]
        failed = [worker.wait() for worker in workers]
        if any(failed):
            raise SystemExit(f"workers ended with {failed}.")
        return
    started, longest = time.perf_counter(), 0.0
    missed: list[str] = []
    for seed in seeds:
        for arm in names:
            name = run_name(arm, tokens, seed)
            left = float("inf") if minutes is None else 60 * minutes - (time.perf_counter() - started)
            if _is_done(results / f"{name}.json", deep) or left < longest:
                continue
            if "QUALITY_WORKER" in os.environ and not _claim(claims / name):
                continue
            begun = time.perf_counter()
            try:
                run_arm(scale, ARMS[arm], tokens, seed, work, results, deep, compile, commit)
            except Exception as error:  # one arm that fails does not cost the others, four may be the machine
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                missed.append(name)
                if len(missed) > 3:
                    raise SystemExit(f"failed: {', '.join(missed)}.") from error
            longest = max(longest, time.perf_counter() - begun)
            if compile:  # else the fourth arm meets torch.compile's limit of variants
                compiled_forward.cache_clear()
                torch._dynamo.reset()
            gc.collect()  # a converted model is full of cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if missed:
        raise SystemExit(f"failed: {', '.join(missed)}.")


def _visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES has or would have."""
    every = [str(i) for i in range(torch.cuda.device_count())]
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(every)).split(",") if every else []


def _is_done(path: Path, deep: bool) -> bool:
    """Whether the run's record is there, with all measures that are asked for."""
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    return not deep or record["mechanism"] == "shared-kv" or "recall" in record["points"][0]


def _claim(path: Path) -> bool:
    """Whether this process may run what `path` stands for: the first to make the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def provenance(device: str, commit: str | None) -> dict[str, Any]:
    """Command, commit, device, versions, date."""
    where = circumstances(torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32)
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    return where | {"command": command, "commit": commit or source_commit()}
