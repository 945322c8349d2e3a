"""Training in one process or several, in scenes of a few steps: what they said, and how fast it was.

All scenes of a part run in the same processes, which import, compile and meet each other once. What is known
is written after each scene.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import modlab
from benchmarks.many_gpus import worker
from benchmarks.many_gpus.breakdown import Breakdown
from benchmarks.many_gpus.compared import UNINTERRUPTED
from benchmarks.many_gpus.parts import KILLED, OF_TWO, ONE, ONE_LARGE, RESUMED, SHARDED, SHARDS
from modlab.errors import ModlabError
from modlab.training.checkpoints import checkpoints

KEYS = ("step", "loss", "kl", "keep_ratio", "grad_norm", "tokens_per_s", "seconds")
SKIPPED_STEPS = 4
LOG_EVERY = 4
"""Steps between two log lines where it is timed: each waits for the GPU, which the steps between do not."""

DIES_AT, SAVED_AT = 6, 4
"""Steps after which a process of "killed" is killed, and after which all have written a checkpoint."""

LEAVES = "kv+prompt"
"""The skip of routers whose prompts leave by position as well."""

Scene = Callable[[argparse.Namespace], dict[str, Any]]


class Told:
    """A run's monitor that writes every log line to a file as soon as it is known, and may end the run.

    Args:
        file: one JSON object a line, by the first process; None: nowhere.
        dies_at: the step after which the last process is killed, as by a machine that is gone.
        stops_at: the step after which the run is ended.
        watch: told of every step.
    """

    def __init__(
        self, file: Path | None = None, dies_at: int | None = None, stops_at: int | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self.file, self.dies_at, self.stops_at, self.watch = file, dies_at, stops_at, watch
        if self.file is not None and worker.rank() == 0:
            self.file.unlink(missing_ok=True)

    def step(self, step: int, share: float) -> bool:
        """Kills its process, or ends the run, where that is due."""
        if self.watch is not None:
            self.watch(step)
        if step == self.dies_at and worker.rank() == worker.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step != self.stops_at

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row."""
        if self.file is not None and worker.rank() == 0:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.said(row)) + "\n")

    def said(self, row: dict[str, Any]) -> dict[str, Any]:
        """What of a row is kept."""
        return {key: row[key] for key in KEYS if key in row}


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """All scenes of a part, by name."""
    if options.toy and options.part in SHARDS and worker.world() > 1:  # on a CPU accelerate never looks there
        from tests.helpers.fsdp_on_cpu import launched_with_fsdp

        launched_with_fsdp()
    found: dict[str, Any] = {"scenes": {}}
    for name, scene in scenes(options).items():
        worker.tidy()  # the scene before has left a model
        worker.forget_peaks()
        found["scenes"][name] = scene(options)
        worker.write(options, found)
    return found


def scenes(options: argparse.Namespace) -> dict[str, Scene]:
    """Of a part, the most valuable first.

    DDP runs two global batches of each model: `rows` a GPU, and `rows` in all; of the large one also with
    prompts that leave. One GPU runs what they are held against: as many rows a GPU as in either of them. The
    larger of these is also the smaller global batch, so that losses can be compared. Two GPUs do as DDP and
    FSDP2 of more. Those of every step are compared where it is not timed.
    """
    small, large = options.model[0], options.model[-1]
    rows, several, few = options.rows, options.rows * options.gpus, options.rows // options.gpus
    others: dict[str, Scene] = {
        title(f"{small}, all weights", rows): functools.partial(all_weights, model=small, rows=rows),
        f"{Path(small).name}, one part skips": skipped,
    }
    each: dict[str, Scene] = {stepwise(small, rows): functools.partial(each_step, model=small, rows=rows)}
    if options.part == RESUMED:
        return {KILLED: taken_up}
    if options.part == KILLED:
        return each | {KILLED: killed}
    if options.part == ONE:
        leaves = _leaving(large, rows, few) if large == small else {}
        return each | _distilling(small, rows, few) | leaves | others
    if options.part == ONE_LARGE:
        return _distilling(large, rows, few) | _leaving(large, rows, few)
    if options.part in OF_TWO.values():
        return _distilling(large, 2 * rows, rows) | _leaving(large, 2 * rows, rows)
    if options.part == SHARDED:
        of_large = _distilling(large, rows, several) | _leaving(large, several, rows)
        return _distilling(small, rows, several) | of_large | others
    batches = _distilling(small, several, rows) | _distilling(large, several, rows)
    leaves = _leaving(large, several, rows)
    return batches | leaves | each | others | {"where the time goes": broken_down}


def _distilling(model: str, *batches: int) -> dict[str, Scene]:
    """A scene for each number of rows of a global batch."""
    return {title(model, rows): functools.partial(distilled, model=model, rows=rows) for rows in batches}


def _leaving(model: str, *batches: int) -> dict[str, Scene]:
    """The same where prompts leave as well."""
    return {
        title(f"{model}, leaving", rows): functools.partial(distilled, model=model, rows=rows, skip=LEAVES)
        for rows in batches
    }


def title(model: str, rows: int) -> str:
    """Of a scene in which routers are distilled, `rows` in a global batch."""
    return f"{Path(model).name}, {rows} rows"


def stepwise(model: str, rows: int) -> str:
    """The same, told step by step."""
    return f"{title(model, rows)}, step by step"


def distilled(options: argparse.Namespace, model: str, rows: int, skip: str = "kv") -> dict[str, Any]:
    """Routers by KV head on their own dense self, and the projections of prompts that leave."""
    history = _run(options, model, rows, Told(), skip=skip)
    lines = history["tokens_per_s"].iloc[1:]  # the first line has compiled
    found = _told(options, history, rows) | {
        "tokens_per_s": float(lines.median()),
        "allocated": worker.allocated(),
    }
    if skip != LEAVES:  # of which the planner knows nothing
        found["planned"] = worker.planned(options, model, "routers", options.length, rows // worker.world())
    return found


def broken_down(options: argparse.Namespace) -> dict[str, Any]:
    """Where two steps of each process go, with the smaller global batch."""
    watch = Breakdown(first=2, steps=2)
    _run(options, options.model[0], options.rows, Told(watch=watch.step, stops_at=watch.last), log_every=100)
    return {"rows": options.rows, **watch.of_all()}


def each_step(options: argparse.Namespace, model: str, rows: int) -> dict[str, Any]:
    """Routers distilled as in `distilled`, a line a step."""
    return _told(options, _run(options, model, rows, Told(), log_every=1), rows)


def killed(options: argparse.Namespace) -> dict[str, Any]:
    """`each_step` with a checkpoint; the process that this kills is the last that the part does."""
    told = Told(options.work / f"{KILLED}.jsonl", dies_at=DIES_AT)
    _run(
        options, options.model[0], options.rows, told, log_every=1, out=_folder(options), save_every=SAVED_AT
    )
    return {"failed": "no process was killed"}


def taken_up(options: argparse.Namespace) -> dict[str, Any]:
    """The same run from its checkpoint to its end, by as many processes as there are now; a line a step. The
    checkpoint stays as it is: it can be taken up again.

    Raises:
        ModlabError: there is no checkpoint. The run would begin at its first step, and agree all the better.
    """
    saved = checkpoints(_folder(options))
    if not saved:
        raise ModlabError(
            f"{_folder(options)} holds no checkpoint to take up: run the part {KILLED!r} first, with the "
            "same --work."
        )
    taken, out = int(saved[-1].name.removeprefix("step_")), options.work / RESUMED
    shutil.rmtree(out, ignore_errors=True)
    told = Told(options.work / f"{RESUMED}.jsonl", stops_at=options.steps)  # or it would save the model
    history = _run(options, options.model[0], options.rows, told, log_every=1, out=out, resume=saved[-1])
    found = _told(options, history, options.rows)
    return {"taken up at step": taken, UNINTERRUPTED: stepwise(options.model[0], options.rows)} | found


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.work / KILLED
    return folder


def _told(options: argparse.Namespace, history: Any, rows: int) -> dict[str, Any]:
    lines = history[_known(history)].to_dict("records")
    return {"lines": lines, "rows": rows, "length": options.length}


def _run(
    options: argparse.Namespace, folder: str, rows: int, told: Told, log_every: int = LOG_EVERY,
    skip: str = "kv", **more: Any,
) -> Any:  # fmt: skip
    """The history of a run that distils routers."""
    model = worker.loaded(folder, worker.dtype(options))
    modlab.convert(model, modlab.MoDConfig(layers="all", skip=skip, **worker.HEADS))
    worker.scatter(model)  # so that the keep ratio is no trivial one from the first step on
    config = modlab.TrainConfig(
        steps=options.steps, batch_size=rows // worker.world(), log_every=log_every,
        calibrate=False, num_workers=0, objective="distil", keep_ratio=0.25, ramp=0.7, router_lr=0.05, **more,
    )  # fmt: skip
    ids = worker.rows_of(options, folder)[: options.steps * rows]
    return modlab.train(model, ids, config, monitor=told).history


def all_weights(options: argparse.Namespace, model: str, rows: int) -> dict[str, Any]:
    """All weights of a routed model, a line a step, with AdamW's state and weights in fp32; where the planner
    says that they fit."""
    planned = worker.planned(options, model, "weights", options.length, rows // worker.world())
    way = "FSDP2" if options.part in SHARDS else "DDP"
    if not next(line["fits"] for line in planned if line["way"] == way):
        return {"left out": "they do not fit", "planned": planned}
    trained = worker.loaded(model, worker.dtype(options))
    modlab.convert(trained, modlab.MoDConfig(layers="all", **worker.HEADS))
    worker.scatter(trained)
    config = modlab.TrainConfig(
        steps=options.steps, batch_size=rows // worker.world(), lr=1e-5, log_every=1, calibrate=False,
        num_workers=0, objective="target", keep_ratio=0.5,
    )  # fmt: skip
    ids = worker.rows_of(options, model)[: options.steps * rows]
    history = modlab.train(trained, ids, config, monitor=Told()).history
    return _told(options, history, rows) | {
        "tokens_per_s": float(history["tokens_per_s"].iloc[LOG_EVERY:].median()),
        "allocated": worker.allocated(),
        "planned": planned,
    }


def skipped(options: argparse.Namespace) -> dict[str, Any]:
    """All weights for a few steps in which no token of the last of `gpus` parts of a batch is kept anywhere:
    with as many processes that is all that the last one has."""
    model = worker.loaded(options.model[0], worker.dtype(options))
    modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all", keep_first=0))
    rows, length = 2 * options.gpus, min(options.length, 1024)
    own = rows // worker.world()

    def keep(layer: int, gate: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The rows before the last part, of those of all processes."""
        number = torch.arange(len(gate), device=gate.device) + worker.rank() * own
        kept_BT = (number < rows - 2)[:, None] & (positions % 2 == layer % 2)
        return kept_BT

    config = modlab.TrainConfig(
        steps=SKIPPED_STEPS, batch_size=own, lr=1e-5, log_every=1, calibrate=False, num_workers=0,
        what_if=0.0, objective="none",
    )  # fmt: skip
    ids = worker.rows_of(options, options.model[0])[: rows * SKIPPED_STEPS, :length]
    with modlab.routing_override(model, keep):
        history = modlab.train(model, ids, config, monitor=Told()).history
    return {"lines": history[_known(history)].to_dict("records"), "rows": rows, "length": length}


def _known(history: Any) -> list[str]:
    return [key for key in KEYS if key in history]
