"""A training run: its parts, and what is done with them between two steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from modlab.errors import ModlabError
from modlab.measure.evaluation import evaluate_batches
from modlab.routing.kv_saving import rounding_of, set_kv_saving
from modlab.routing.recent_tokens import recent_at
from modlab.routing.state import is_converted
from modlab.routing.trained import Trained
from modlab.training.anchors import anchored, may_skip_all
from modlab.training.calibration import (
    calibrate_trained,
    calibration_batches,
    common,
    open_gates,
    saving_for_keep,
    saving_text,
    thresholds_by_ratio,
)
from modlab.training.checkpoints import (
    State,
    checkpoints,
    load_checkpoint,
    readable,
    write_checkpoint,
)
from modlab.training.checks import (
    check_begin,
    check_fit,
    check_model,
    check_processes,
    check_rows_teach,
)
from modlab.training.clock import Clock
from modlab.training.config import TrainConfig
from modlab.training.folder import RunFolder
from modlab.training.loader import Batch, Batches, open_batches
from modlab.training.model import Compilation, lent_to_training, routers_learn
from modlab.training.monitor import Monitor
from modlab.training.processes import Processes
from modlab.training.reach import Reach
from modlab.training.result import Stopped, TrainResult
from modlab.training.resume import check_resumable, find_checkpoint, resume_recent
from modlab.training.schedule import keep_target
from modlab.training.sharding import reshard, whole_state
from modlab.training.step import Step
from modlab.training.weights import Weights
from modlab.training.window import FIGURES, Window


class Run:
    """A run that is ready for its next step; used as a context, after which the model is the user's again.

    Arguments as of `modlab.train`; `now` is its clock, in seconds.

    Raises:
        ModlabError: bad settings or data, before anything is written.
    """

    def __init__(
        self,
        model: Any,
        batches: Any,
        config: TrainConfig,
        *,
        eval_data: Any = None,
        teacher: Any = None,
        tokenizer: Any = None,
        monitor: Monitor | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        config.check()
        self.model, self.config, self.tokenizer, self.monitor = model, config, tokenizer, monitor
        self.objective = check_model(config, model, teacher)
        self.source = open_batches(batches)
        self.eval_source = _repeatable(eval_data)
        self._check_data()
        self.processes = Processes()
        self._check_processes()
        self.steps = _steps(config, self.source, self.processes.world)
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        checkpoint = find_checkpoint(config)
        if checkpoint is None:
            check_begin(config, model)
        elif config.recent_range is not None:
            resume_recent(checkpoint, model)
        self.description = self._description()
        if checkpoint is not None:
            check_resumable(checkpoint, self.description)

        self.step = self.tokens = 0
        self.saved_step = -1
        self.half_updated = False  # between two steps, but for the moment in which the weights change
        self.stop_asked = False
        self.latest: list[Batch] = []  # of the latest step
        self.clock = Clock(config.max_minutes, self.processes.of_main, now)
        self.folder = RunFolder(config.out, self.processes.is_main)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.folder.held())
            lent = stack.enter_context(contextlib.ExitStack())
            lent.enter_context(lent_to_training(model, config))
            self.routers_learn = is_converted(model) and routers_learn(model)
            if may_skip_all(model, self.source):
                lent.enter_context(anchored(model))
            lent.callback(self._free)
            set_seed(config.seed + self.processes.rank)  # dropout of its own for each process's rows
            if teacher is not None and config.kl:
                teacher.eval()
            for one in (model, teacher if config.kl else None):
                if one is not None and not self.processes.shards:  # FSDP2 moves its parts
                    one.to(self.processes.device)
            self.stepping = Step(model, config, self.objective, self.processes, teacher)
            lent.callback(self.stepping.end)
            lent.callback(reshard, model)
            self.window = Window(self.stepping.layers, self.processes.device)
            self.thresholds: dict[float, dict[int, float]] = {}
            self.reach = self._reach()
            self.weights = Weights(model) if config.out is not None else None
            if checkpoint is not None:
                self._restore(checkpoint)
            elif self.objective == "distil":
                self._begin_distillation()
            self.compilation = Compilation(model) if config.compile else None
            if self.compilation is not None:
                self.compilation.on()
                lent.callback(self.compilation.off)
            self.history = self.folder.begin(self.description, self.step, steps_ahead=not self.is_done)
            self.lent, self.held = lent, stack.pop_all()

    def _check_data(self) -> None:
        """Refuses data that do not fit the model."""
        check_fit(self.model, self.source, "batches")
        if self.config.recent_range is None:  # else rows have fewer recent tokens than they store
            check_rows_teach(self.model, self.source, self.objective)
        if self.eval_source is not None:
            check_fit(self.model, self.eval_source, "eval_data")

    def _check_processes(self) -> None:
        check_processes(self.config, self.source, self.processes.world)
        if not self.processes.agree((self.source.outline, self.config.to_dict())):
            raise ModlabError(
                "the processes were given other data or settings: each of them has to be given all rows, of "
                "which modlab.train picks its own."
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.held:
            if kind is not None:
                self.folder.end("failed")

    def _description(self) -> dict[str, Any]:
        """What run.json and every checkpoint say of the run."""
        routing = self.model.mod if is_converted(self.model) else None
        device = self.processes.device
        return {
            **self.config.to_dict(),
            "objective": self.objective,
            "processes": self.processes.world,
            "global_batch": rows_a_step(self.config, self.source, self.processes.world),
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "mod": routing.config.to_dict() if routing is not None else None,
            "data": self.source.fingerprint if self.config.out is not None else None,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }

    @property
    def share(self) -> float:
        """How much of the run is behind, in [0, 1]."""
        return self.clock.share if self.steps is None else min(1.0, self.step / self.steps)

    @property
    def is_done(self) -> bool:
        """Whether all of it is behind."""
        return self.share >= 1 if self.steps is None else self.step >= self.steps

    def batches(self) -> Iterator[list[Batch]]:
        """This process's part of each global batch that is ahead; begins the run's time."""
        config, accumulated = self.config, self.config.grad_accum
        stream = self.source.iterate(
            config.batch_size,
            config.seed,
            start=self.step * accumulated,
            rank=self.processes.rank,
            world=self.processes.world,
            num_workers=config.num_workers,
        )
        self.clock.start(self.tokens)
        while len(parts := list(itertools.islice(stream, accumulated))) == accumulated:
            yield parts

    def train_step(self, parts: list[Batch]) -> None:
        """One optimiser step."""
        self.stepping.begin(self.step, self.share)
        self.latest = [self.stepping.to_device(part) for part in parts]
        self.half_updated = self.processes.zero  # the engine takes its step in the backward pass
        figures = self.stepping.backward(self.latest)
        self.half_updated = True
        self._forget_origin()
        figures["grad_norm"] = self.stepping.update()
        self.window.add(figures)
        self.tokens += sum(part["input_ids"].numel() for part in parts) * self.processes.world
        self.step += 1
        self.half_updated = False
        self.clock.step_done()

    @property
    def is_log_step(self) -> bool:
        """Whether a log line is due: the only place where the device is waited for."""
        return self.step % self.config.log_every == 0 or self.is_eval_step or self.step == self.steps

    @property
    def is_eval_step(self) -> bool:
        """Whether an evaluation is due."""
        return self.config.eval_every > 0 and self.step % self.config.eval_every == 0

    @property
    def is_save_step(self) -> bool:
        """Whether a checkpoint is due."""
        return self.config.save_every > 0 and self.step % self.config.save_every == 0

    def monitored(self) -> bool:
        """Tells the monitor of the step; whether it wants to go on. What it takes is not the run's time."""
        if self.monitor is None:
            return True
        with self.clock.paused():
            self.stepping.settle_thresholds()  # it may use the model
            return self.monitor.step(self.step, self.share)

    @property
    def is_interrupted(self) -> bool:
        """Whether any process was asked to stop; asking the others costs a wait, so only at log steps."""
        if self.processes.world > 1 and self.step % self.config.log_every:
            return False
        return self.processes.any(self.stop_asked)

    @property
    def is_out_of_time(self) -> bool:
        """Whether this call has taken its minutes, where these do not set the run's length."""
        if self.config.max_minutes is None or self.steps is None:
            return False
        if self.processes.world > 1 and self.step % self.config.log_every:
            return False
        return self.clock.is_over

    def log(self, evaluated: bool = False) -> dict[str, Any]:
        """Writes a line on the steps since the line before, and returns it."""
        sums = self._read_window()
        means = {name: value / self.window.steps for name, value in sums.items()}
        row: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "loss": means["loss"]}
        layers, stepping = self.stepping.layers, self.stepping
        if layers:
            row["keep_ratio"] = sum(means[f"keep_{i}"] for i in layers) / len(layers)
            row |= {f"keep_{i}": means[f"keep_{i}"] for i in layers}
            row["objective"] = means["objective"]
        if self._aims:
            row["target"] = stepping.target
        stepping.settle_thresholds()
        if self.objective == "budget":
            row |= {f"p_{i}": p for i, p in self.model.mod.thresholds.items()}
        if self.config.kl or self.objective == "distil":
            row["kl"] = means["kl"]
        if self.reach is not None:
            self.reach.see(self.share, row["keep_ratio"], row["target"])
        if means["balance"]:
            row["balance"] = means["balance"]
        row["lr"] = stepping.adamw.param_groups[0]["lr"]
        row["grad_norm"] = means["grad_norm"]
        row["tokens_per_s"] = self.clock.tokens_per_second(self.tokens)
        row["seconds"] = self.clock.seconds
        if evaluated:
            row |= self.evaluate()
        self.window.clear()
        self.history.append(row)
        if self.monitor is not None:
            self.monitor.log(row)
        self.folder.add_row(row)
        self.clock.set_mark(self.tokens)
        return row

    def evaluate(self, settled: bool = False) -> dict[str, float]:
        """Loss and keep ratio on the held-out data, as decoding would see them; of a distillation also the KL
        at its `keep_ratio`.

        Args:
            settled: the model's own thresholds keep that, as they do once it is calibrated.
        """
        source, config = self.eval_source, self.config
        if source is None:
            return {}
        size = config.batch_size
        if source.kind == "rows":  # there is something for each process
            size = max(1, min(size, len(source.data) // self.processes.world))
        with self.compilation.paused() if self.compilation is not None else contextlib.nullcontext():
            found = evaluate_batches(
                self.model,
                source.iterate(size, seed=None, epochs=1),
                max_batches=config.eval_batches,
                cache=False,
                accelerator=self.processes.accelerator,
                autocast=self.stepping.autocast,
                forward=self.model.forward if config.compile else None,
            )
        figures = {"eval_loss": found.loss}
        if self.stepping.layers:
            figures["eval_keep_ratio"] = found.keep_ratio
        if (distillation := self.stepping.distillation) is not None:
            with self.compilation.paused() if self.compilation is not None else contextlib.nullcontext():
                batches = itertools.islice(
                    source.iterate(size, seed=None, epochs=1), config.eval_batches or None
                )
                figures |= distillation.held_out(batches, self.stepping.autocast, settled)
        return figures

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one."""
        if self.weights is None or self.saved_step == self.step or self.folder.path is None:
            return
        window = self._read_window()
        with self.clock.not_training():
            state = State(
                self.step, self.tokens, **self.clock.state(self.share),
                window=window, window_steps=self.window.steps, run=self.description,
            )  # fmt: skip
            control = self.stepping.control
            write_checkpoint(
                self.folder.path,
                state,
                self.weights,
                self.stepping.optimizer,
                control.state() if control is not None else None,
                self.processes,
            )
            self.folder.prune(self.config.keep_last)
        self.saved_step = self.step

    def finish(self, stopped: Stopped) -> TrainResult:
        """What comes after the last step: calibration, the last evaluation, the model's folder."""
        config, stepping = self.config, self.stepping
        stepping.settle_thresholds()
        complete = stopped in ("finished", "data") or (stopped == "time" and self.steps is None)
        if complete:
            if self.window.steps:
                self.log()
            settled = config.calibrate and self._aims
            if settled:
                if config.save_every:
                    self.save()  # before: a longer run goes on from the model as trained
                self._calibrate()
            if self.eval_source is not None and self.history and "eval_loss" not in self.history[-1]:
                self.history[-1] |= self.evaluate(settled)
                self.folder.write_log(self.history)
        if not complete or config.save_every:
            self.save()
        seconds = self.clock.seconds
        self.processes.wait()
        self.lent.close()  # the model is saved in its own dtypes
        if complete:
            state = self._whole_state() if self.folder.path is not None else None
            self.folder.save_model(self.model, self.tokenizer, self.step, state)
        self.folder.end(stopped)
        self.processes.wait()
        history = pd.DataFrame(self.history)
        return TrainResult(
            history, self.model, self.folder.path, self.step, self.tokens, seconds, stopped,
            thresholds=self.thresholds,
        )  # fmt: skip

    def _whole_state(self) -> dict[str, Tensor] | None:
        """Of a sharded model, on the main process: what is saved; all processes take part in gathering it."""
        if not self.processes.shards:
            return None
        return whole_state(self.model, self.dtypes, keep=self.processes.is_main)

    def progress_bar(self) -> Any:
        """Of this call's steps, in the main process; a monitor takes its place."""
        return tqdm(
            total=self.steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not self.processes.is_main or self.monitor is not None,
        )

    def _restore(self, checkpoint: Path) -> None:
        stepping, processes = self.stepping, self.processes
        assert self.weights is not None  # a checkpoint is of a run with a folder
        state, routing = load_checkpoint(checkpoint, self.weights, stepping.optimizer, processes)
        with readable(checkpoint):
            if stepping.control is not None:
                if routing is None:
                    raise ValueError(
                        f"it lacks what the thresholds of objective={self.objective!r} go on from"
                    )
                stepping.control.restore(routing)
            self.window.restore(state.window, state.window_steps, processes.is_main)
        self.step, self.tokens = state.step, state.tokens
        self._forget_origin()
        self.clock.restore({"seconds": state.seconds, "share": state.share})

    def _read_window(self) -> dict[str, float]:
        """Sums since the last log line.

        Raises:
            ModlabError: one of them is not finite.
        """
        sums = self.window.read(self.processes.sum)
        bad = [name for name in FIGURES if not math.isfinite(sums[name])]
        if bad:
            saved = checkpoints(self.folder.path)
            raise ModlabError(
                f"{bad[0]} is not finite at or before step {self.step}; nothing was saved since. "
                + (f"The last checkpoint, {saved[-1]}, is intact; resume from it" if saved else "Start again")
                + f" with a lower lr (now {self.config.lr:g}), a longer warmup or a smaller max_grad_norm."
            )
        return sums

    def _calibrate(self) -> None:
        config, held_out = self.config, self.eval_source
        if self.objective != "distil" or held_out is None:
            batches = self._calibration_batches()
        else:
            world, device = self.processes.world, self.processes.device
            batches = calibration_batches(held_out, config, [], world, device)
        if not batches or config.keep_ratio == 1:
            return
        if self.compilation is not None:
            self.compilation.off()  # for good: no compilation for eval mode
        calibrate_trained(
            self.model,
            batches,
            keep_ratio=config.keep_ratio,
            per_layer=config.per_layer,
            autocast=self.stepping.autocast,
            accelerator=self._sharing,
        )
        if self.objective == "distil" and config.keep_range is not None:
            self.thresholds = thresholds_by_ratio(
                self.model, batches, config.keep_range, config.recent_range, self.stepping.autocast,
                self._sharing,
            )  # fmt: skip
            self.folder.write_thresholds(self.thresholds)
            self._note_savings(
                common(self.thresholds), saving_text(self.model, batches[0]["input_ids"].shape[1])
            )

    def _note_savings(self, savings: dict[float, float], seq_len: int) -> None:
        """What is known of the routers from here on; with recent tokens by saving the model gets those, and
        the threshold, of the saving that was asked for."""
        recent_range, routing = self.config.recent_range, self.model.mod
        asked = round(saving_for_keep(self.model, self.config.keep_ratio), 6)
        recent = (
            {}
            if recent_range is None
            else {saving: recent_at(recent_range, saving, seq_len, routing.most_recent) for saving in savings}
        )
        routing.trained = Trained(
            savings=savings,
            recent=recent,
            seq_len=seq_len,
            tokens=self.tokens,
            method=f"distilled to the dense model, {self.tokens:,} tokens",
        )
        if recent and min(recent) <= asked <= max(recent):
            set_kv_saving(self.model, rounding_of(self.model).total(asked))

    def _forget_origin(self) -> None:
        if self.routers_learn:
            self.model.mod.forget_origin()

    def _begin_distillation(self) -> None:
        batches, stepping = self._calibration_batches(), self.stepping
        self._forget_origin()  # gates that open are shifted
        target = keep_target(self.config, 0, 0.0)
        open_gates(self.model, batches, stepping.autocast, self._sharing, target)
        assert stepping.distillation is not None
        stepping.distillation.prime(batches, stepping.autocast, self.processes.sum)

    def _calibration_batches(self) -> list[Batch]:
        latest = self.processes.gather(self.latest) if self.source.kind == "stream" else []
        processes = self.processes
        return calibration_batches(self.source, self.config, latest, processes.world, processes.device)

    @property
    def _sharing(self) -> Any:
        """The accelerator whose processes share what is measured; None in a single one."""
        return self.processes.accelerator if self.processes.world > 1 else None

    @property
    def _aims(self) -> bool:
        """Whether gates are pulled to a keep ratio; where the skip decides by itself, none is."""
        aimed = self.objective in ("target", "budget", "distil")
        return aimed and not self.model.mod.skip.decides_itself

    def _reach(self) -> Reach | None:
        config = self.config
        if self.objective != "distil" or not self._aims or not self.processes.is_main:
            return None
        return Reach(config.keep_ratio if config.keep_range is None else config.keep_range[0])

    def _free(self) -> None:
        self.processes.accelerator.free_memory()
        self.model.zero_grad(set_to_none=True)


def _repeatable(eval_data: Any) -> Batches | None:
    if isinstance(eval_data, Iterator):  # it is read several times
        eval_data = list(eval_data)
    return None if eval_data is None else open_batches(eval_data, "eval_data")


def rows_a_step(config: TrainConfig, source: Batches, world: int) -> int:
    """Rows of a global batch; of ready-made batches, how many of them."""
    return (config.batch_size if source.kind == "rows" else 1) * config.grad_accum * world


def _steps(config: TrainConfig, source: Batches, world: int) -> int | None:
    """How many optimiser steps the run is long; None where the clock says."""
    if config.tokens is None:
        return config.steps
    first = source.first["input_ids"]
    rows = rows_a_step(config, source, world) * (1 if source.kind == "rows" else len(first))
    return -(-config.tokens // (rows * first.shape[1]))
