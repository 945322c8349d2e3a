"""Training in one process or several: what every step said, and how fast it was."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

import modlab
from benchmarks.many_gpus import worker
from benchmarks.many_gpus.parts import DISTILLED, SHARDED, WEIGHTS

KEYS = ("step", "loss", "kl", "keep_ratio", "grad_norm", "tokens_per_s", "seconds")
SKIPPED_STEPS = 4


def saved_at(steps: int) -> int:
    """The step whose checkpoint the killed run leaves; its process dies two steps later."""
    return max(1, steps // 4)


class Told:
    """A run's monitor that writes every step to a file as soon as it is known, and may end the run.

    Args:
        file: one JSON object a line, by the first process.
        dies_at: the step after which the last process is killed, as by a machine that is gone.
        stops_at: the step after which the run is ended.
    """

    def __init__(self, file: Path, dies_at: int | None = None, stops_at: int | None = None) -> None:
        self.file, self.dies_at, self.stops_at = file, dies_at, stops_at
        self.file.unlink(missing_ok=True)

    def step(self, step: int, share: float) -> bool:
        """Kills its process, or ends the run, where that is due."""
        if step == self.dies_at and worker.rank() == worker.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step != self.stops_at

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row."""
        if worker.rank() == 0:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: row[key] for key in KEYS if key in row}) + "\n")


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """Routers distilled, or all weights with the loss and a dense teacher."""
    what, steps = options.part, options.steps
    _shard_on_a_cpu(options)
    distils = options.kind == DISTILLED
    model = worker.loaded(options, worker.dtype(options))
    modlab.convert(model, modlab.MoDConfig(layers="all", **(worker.HEADS if distils else {})))
    worker.scatter(model)  # so that the keep ratio is no trivial one from the first step on
    more: dict[str, Any] = {"objective": "distil", "keep_ratio": 0.25, "ramp": 0.7, "router_lr": 0.05}
    teacher = None
    if options.kind == WEIGHTS:
        more, teacher = {"lr": 1e-5, "kl": 1.0}, worker.loaded(options, worker.dtype(options))
    told = Told(options.work / f"{options.file}.jsonl")
    if what in ("killed", "resumed"):
        more |= {"out": options.work / "killed", "save_every": saved_at(steps), "resume": "auto"}
        told.dies_at = saved_at(steps) + 2 if what == "killed" else None
        told.stops_at = saved_at(steps) + 4 if what == "resumed" else None
    config = modlab.TrainConfig(
        steps=steps, batch_size=options.rows // worker.world(), log_every=1, calibrate=False, num_workers=0,
        **more,
    )  # fmt: skip
    rows = torch.load(options.work / f"rows_{Path(options.model[0]).name}.pt")[: steps * options.rows]
    result = modlab.train(model, rows, config, teacher=teacher, monitor=told)
    history = result.history
    speed = history["tokens_per_s"].iloc[len(history) // 2 :].median()
    figures = {"tokens_per_s": float(speed), "steps": history[_known(history)].to_dict("records")}
    worker.write(options, figures)
    return {
        **figures,
        "rows": options.rows,
        "length": options.length,
        "allocated": worker.allocated(),
        "planned": worker.planned(options, "routers" if distils else "weights"),
    }


def skipped(options: argparse.Namespace) -> dict[str, Any]:
    """All weights for a few steps in which no token of the last of `gpus` parts of a batch is kept anywhere:
    with as many processes that is all that the last one has."""
    _shard_on_a_cpu(options)
    model = worker.loaded(options, worker.dtype(options))
    modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all", keep_first=0))
    rows, length = 2 * options.gpus, min(options.length, 1024)
    own = rows // worker.world()

    def keep(layer: int, gate: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The rows before the last part, of those of all processes."""
        number = torch.arange(len(gate), device=gate.device) + worker.rank() * own
        kept_BT = (number < rows - 2)[:, None] & (positions % 2 == layer % 2)
        return kept_BT

    told = Told(options.work / f"{options.file}.jsonl")
    config = modlab.TrainConfig(
        steps=SKIPPED_STEPS, batch_size=own, lr=1e-5, log_every=1, calibrate=False, num_workers=0,
        what_if=0.0, objective="none",
    )  # fmt: skip
    every = torch.load(options.work / f"rows_{Path(options.model[0]).name}.pt")
    ids = every[: rows * SKIPPED_STEPS, :length]
    with modlab.routing_override(model, keep):
        history = modlab.train(model, ids, config, monitor=told).history
    return {"steps": history[_known(history)].to_dict("records"), "rows": rows, "length": length}


def _known(history: Any) -> list[str]:
    return [key for key in KEYS if key in history]


def _shard_on_a_cpu(options: argparse.Namespace) -> None:
    """There accelerate never looks at its flags."""
    if options.toy and options.part in SHARDED:
        from tests.helpers.fsdp_on_cpu import launched_with_fsdp

        launched_with_fsdp()
