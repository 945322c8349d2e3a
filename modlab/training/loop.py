"""`modlab.train`: one accelerate loop for dense pre-training, conversion and continuation.

The device is waited for only at log steps, evaluations and checkpoints. Every step's data, learning rate,
target and what-if flag follow from its number (or the clock, if `max_minutes` alone sets the length), which
is what lets a resumed run repeat the uninterrupted one bit for bit.

On several processes (`accelerate launch`) each gets its rows of the same global batch and gradients are
averaged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.routing.router import is_router
from modlab.routing.state import is_converted
from modlab.training import objectives
from modlab.training.calibration import calibrate_trained, calibration_batches
from modlab.training.checks import (
    check_fit,
    check_length,
    check_processes,
    check_rows_teach,
    check_teacher,
    choose_objective,
)
from modlab.training.compile import LayerCompilation
from modlab.training.config import TrainConfig, is_what_if, keep_target, lr_factor
from modlab.training.files import (
    checkpoints,
    find_checkpoint,
    log_until,
    write_json,
    write_lines,
)
from modlab.training.loader import Batch, open_batches
from modlab.training.monitor import Monitor
from modlab.training.result import Stopped, TrainResult
from modlab.training.step import (
    evaluate,
    forward_logits,
    labels_of,
    parameter_groups,
    recording_of,
    routing_objective,
)
from modlab.training.threshold_control import ThresholdControl

__all__ = ["TrainConfig", "TrainResult", "evaluate", "train"]


def train(
    model: Any,
    batches: Any,
    config: TrainConfig,
    *,
    eval_data: Any = None,
    teacher: Any = None,
    tokenizer: Any = None,
    monitor: Monitor | None = None,
) -> TrainResult:
    """Train `model` in place and return it in eval mode with the run's history.

    Args:
        model: a `transformers` causal language model, dense or converted.
        batches: `data.packed(...)`, any data set of rows or iterable of batches; see `modlab.loader`. Labels
            are
            `labels` if there are any, else the input ids where attention_mask is not 0.
        config: see `TrainConfig`.
        eval_data: held-out data, any of the same kinds.
        teacher: a dense model with the same vocabulary, for `config.kl`.
        tokenizer: saved beside the final model.
        monitor: told of every step and log line, may pause the run and end it; takes the progress bar's
            place.

    Returns:
        TrainResult. Ctrl-C ends the run after the step in flight, saves a checkpoint if there is an `out`
        folder, and returns with `interrupted` set (a second Ctrl-C raises).

    Raises:
        ModlabError: bad settings or data, before anything is written; a loss that is not finite, with the
            last checkpoint kept.
    """
    run = _Run(model, batches, config, eval_data, teacher, tokenizer, monitor)
    try:
        return run.run()
    finally:
        run.close()


@dataclass
class _Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    share: float = 0.0  # of the run, where the clock alone sets its length
    window: dict[str, float] = field(default_factory=dict)  # sums since the last log line
    window_steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Run:
    def __init__(
        self,
        model: Any,
        batches: Any,
        config: TrainConfig,
        eval_data: Any,
        teacher: Any,
        tokenizer: Any,
        monitor: Monitor | None = None,
    ) -> None:
        config.check()
        self.monitor = monitor
        self.config, self.tokenizer, self.teacher = config, tokenizer, teacher
        self.model = model
        self.converted = is_converted(model)
        self.objective = choose_objective(config, model)
        self.source = open_batches(batches)
        if isinstance(eval_data, Iterator):  # it is gone through more than once
            eval_data = list(eval_data)
        self.eval_source = None if eval_data is None else open_batches(eval_data, "eval_data")
        check_fit(model, self.source, "batches")
        check_rows_teach(model, self.source, self.objective)
        if self.eval_source is not None:
            check_fit(model, self.eval_source, "eval_data")
        check_teacher(config, model, teacher)
        self.out = None if config.out is None else Path(config.out)

        from accelerate import Accelerator  # after the checks that need no device

        self.accelerator = Accelerator(mixed_precision="no")  # autocast is ours, see _autocast
        self.world = self.accelerator.num_processes
        check_processes(config, model, self.source, self.world)
        self.checkpoint = find_checkpoint(config, self._description())
        self.device = self.accelerator.device
        first = self.source.first["input_ids"]
        rows = config.batch_size if self.source.kind == "rows" else len(first)
        self.step_tokens = rows * first.shape[1] * config.grad_accum * self.world
        self.steps = config.steps
        if config.tokens is not None:
            self.steps = -(-config.tokens // self.step_tokens)
        self.layers: list[int] = list(model.mod.layers) if self.converted else []
        self.columns = ["loss", "objective", "kl", "grad_norm", *(f"keep_{i}" for i in self.layers)]
        self.restore: list[Any] = []
        self.history: list[dict[str, Any]] = []
        self.stop_asked = False
        self.saved_step = -1
        self.half_updated = False
        self.target = config.keep_ratio
        self.latest: list[Batch] = []  # the latest step's
        self.compilation: LayerCompilation | None = None
        self.control: ThresholdControl | None = None

    # --- set-up and tear-down
    # -------------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        return {
            **self.config.to_dict(),
            "processes": self.world,
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "mod": self.model.mod.config.to_dict() if self.converted else None,
            "torch": torch.__version__,
            "device": _device_name(self.accelerator.device),
        }

    def _prepare(self) -> None:
        from accelerate.utils import set_seed

        config, model = self.config, self.model
        set_seed(config.seed)
        if config.freeze_base:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not is_router(name):
                    parameter.requires_grad_(False)
                    self.restore.append(lambda p=parameter: p.requires_grad_(True))
        elif self.converted:
            model.mod.base_trained = True
        dtypes = {
            p: p.dtype
            for p in model.parameters()
            if p.is_floating_point()
            and p.dtype != torch.float32
            and (p.requires_grad or not config.freeze_base)
        }
        if dtypes:  # AdamW steps are too small for bf16 weights; those of a frozen base take none
            for parameter in dtypes:
                parameter.data = parameter.data.float()
            self.restore.append(lambda: _cast(dtypes))
        if self.converted:
            self.restore.append(lambda was=model.mod.what_if: setattr(model.mod, "what_if", was))
        if self.teacher is not None and config.kl:
            self.teacher.to(self.device).eval()
        model.to(self.device).train()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=config.lr,
            betas=config.betas,
            fused=self.device.type == "cuda",
        )
        if config.compile and self.converted:
            self.compilation = LayerCompilation(model)
            self.compilation.on()
            self.restore.append(self.compilation.off)
        elif config.compile:
            model.compile(dynamic=False)
            self.restore.append(lambda: setattr(model, "_compiled_call_impl", None))
        if self.objective == "budget":
            self.control = ThresholdControl(self.layers, config.per_layer, self.device)
            self.accelerator.register_for_checkpointing(self.control)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.progress = _Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        if self.checkpoint is not None:
            try:
                self.accelerator.load_state(str(self.checkpoint))
            except Exception as error:
                raise ModlabError(
                    f"Could not load the checkpoint {self.checkpoint}: {type(error).__name__}: {error}\n"
                    "It belongs to another model, or is damaged; delete it to resume from the one before."
                ) from error
        self.sums = torch.tensor(
            [self.progress.window.get(c, 0.0) for c in self.columns], dtype=torch.float32, device=self.device
        )
        self.resumed_at = self.progress.step
        if self.out is not None and self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "run.json", self._description())
            self.history = log_until(self.out / "log.jsonl", self.progress.step)

    def close(self) -> None:
        for undo in reversed(self.restore):
            undo()
        self.restore.clear()
        if hasattr(self, "wrapped"):
            self.accelerator.free_memory()
            self.model.zero_grad(set_to_none=True)
        self.model.eval()

    # --- the loop
    # -------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        self._prepare()
        config, progress = self.config, self.progress
        stopped: Stopped = "finished"
        self.started = self.mark = time.perf_counter()
        self.mark_tokens = progress.tokens
        self.warm: float | None = None
        stream = self.source.iterate(
            config.batch_size,
            config.seed,
            start=progress.step * config.grad_accum,
            rank=self.accelerator.process_index,
            world=self.world,
            num_workers=config.num_workers,
        )
        with self._progress_bar() as bar, _interrupts(self):
            try:
                while not self._done():
                    group = self._next_group(stream)
                    if group is None:
                        stopped = "data"
                        break
                    self._step(group)
                    if self.warm is None:
                        self.warm = self._agreed(self._seconds())
                    bar.update()
                    self._after_step(bar)
                    if self.monitor is not None and not self._monitored(self.monitor):
                        self.stop_asked = True
                    if self._interrupted():
                        stopped = "interrupted"
                        break
                    if self._out_of_time():
                        stopped = "time"
                        break
            except KeyboardInterrupt:
                if self.half_updated:  # only the last checkpoint is sound
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                stopped = "interrupted"
        return self._finish(stopped)

    def _done(self) -> bool:
        return (
            self.steps is not None
            and self.progress.step >= self.steps
            or (self.steps is None and self._share() >= 1)
        )

    def _next_group(self, stream: Iterator[Batch]) -> list[Batch] | None:
        group = []
        for _ in range(self.config.grad_accum):
            batch = next(stream, None)
            if batch is None:
                return None
            group.append(batch)
        return group

    def _step(self, group: list[Batch]) -> None:
        config, progress, accelerator = self.config, self.progress, self.accelerator
        share = self._share()
        factor = lr_factor(config, progress.step, share)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["peak_lr"] * factor
        if self.converted:
            self.model.mod.what_if = is_what_if(config.what_if, progress.step)
        self.target = keep_target(config, progress.step, share)
        if self.control is not None:
            self.model.mod.thresholds.update(self.control.thresholds(self.target))
        sums, tokens = torch.zeros_like(self.sums), 0
        for i, batch in enumerate(group):
            batch = self._to_device(batch)
            self.latest = [*self.latest, batch] if i else [batch]
            last = i == len(group) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss, row = self._loss(batch)
                accelerator.backward(loss / len(group))
            sums += row / len(group)
            tokens += batch["input_ids"].numel() * self.world
        sums[3] = accelerator.clip_grad_norm_(self.wrapped.parameters(), config.max_grad_norm).detach()
        self.half_updated = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums += sums
        progress.tokens += tokens
        progress.step += 1
        progress.window_steps += 1
        self.half_updated = False

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and this batch's row of `self.columns` (gradient norm left at 0)."""
        config = self.config
        with self._autocast(), recording_of(self.model, detach=False) as recording:
            logits = forward_logits(self.wrapped, batch)
        loss = objectives.next_token_loss(logits, labels_of(batch))
        zero = torch.zeros((), device=self.device)
        regulariser = divergence = zero
        kept: Tensor | None = None
        if recording is not None:
            step = recording.steps[-1]
            kept = objectives.keep_ratios(step)
            if self.control is not None:
                self.control.update(step, self.model.mod.config.keep_first, self._summed)
            regulariser = routing_objective(self.objective, step, self.target, config)
        if config.kl:
            with torch.no_grad(), self._autocast():
                teacher = forward_logits(self.teacher, batch)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
            divergence = objectives.kl_to_teacher(logits, teacher, real)
        row = torch.stack([loss, regulariser, divergence, zero]).detach()
        if kept is not None:
            row = torch.cat([row, kept])
        return loss + regulariser + config.kl * divergence, row

    def _monitored(self, monitor: Monitor) -> bool:
        """Whether to go on. What the monitor takes, a pause for example, is not the run's time."""
        paused = time.perf_counter()
        self._settle_thresholds()  # it may use the model
        go_on = monitor.step(self.progress.step, self._share())
        waited = time.perf_counter() - paused
        self.started += waited
        self.mark += waited
        return go_on

    def _after_step(self, bar: Any) -> None:
        config, step = self.config, self.progress.step
        evaluate_now = config.eval_every and step % config.eval_every == 0
        if step % config.log_every == 0 or evaluate_now or (self.steps is not None and step == self.steps):
            self._log(bar, bool(evaluate_now))
        if config.save_every and step % config.save_every == 0:
            self._save()

    # --- measuring and writing
    # ------------------------------------------------------------------------------------

    def _read_window(self) -> dict[str, float]:
        """Sums since the last log line over all processes' means; waits for the device."""
        values = self.accelerator.reduce(self.sums.clone(), "mean").tolist()
        window = dict(zip(self.columns, values, strict=True))
        bad = [
            name for name in ("loss", "objective", "kl", "grad_norm") if not abs(window[name]) < float("inf")
        ]
        if bad:
            saved = checkpoints(self.out)
            raise ModlabError(
                f"{bad[0]} is not finite at or before step {self.progress.step}; nothing was saved since. "
                + (f"The last checkpoint, {saved[-1]}, is intact; resume from it" if saved else "Start again")
                + f" with a lower lr (now {self.config.lr:g}), a longer warmup or a smaller max_grad_norm."
            )
        return window

    def _log(self, bar: Any, evaluate_now: bool) -> None:
        progress, window = self.progress, self._read_window()
        now = time.perf_counter()
        means = {name: value / progress.window_steps for name, value in window.items()}
        row: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens, "loss": means["loss"]}
        if self.layers:
            row["keep_ratio"] = sum(means[f"keep_{i}"] for i in self.layers) / len(self.layers)
            row |= {f"keep_{i}": means[f"keep_{i}"] for i in self.layers}
            row["objective"] = means["objective"]
        if self.objective in ("target", "budget"):
            row["target"] = self.target
        self._settle_thresholds()
        if self.objective == "budget":
            row |= {f"p_{i}": p for i, p in self.model.mod.thresholds.items()}
        if self.config.kl:
            row["kl"] = means["kl"]
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["grad_norm"] = means["grad_norm"]
        row["tokens_per_s"] = (progress.tokens - self.mark_tokens) / max(now - self.mark, 1e-9)
        row["seconds"] = self._seconds()
        if evaluate_now:
            row |= self._evaluate()
        self.sums.zero_()
        progress.window_steps = 0
        self._write_row(row)
        shown = {k: row[k] for k in ("loss", "eval_loss", "keep_ratio") if k in row}
        bar.set_postfix_str(
            ", ".join(f"{k} {v:.3f}" for k, v in shown.items())
            + f", {row['tokens_per_s']:,.0f} tok/s"
            + (f", left {self._time_left():.0f} s" if self.steps is None else "")
        )
        self.mark, self.mark_tokens = time.perf_counter(), progress.tokens

    def _write_row(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if self.monitor is not None:
            self.monitor.log(row)
        if self.out is not None and self.accelerator.is_main_process:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _settle_thresholds(self) -> None:
        """The thresholds for `keep_ratio` as plain numbers, for all that comes between two steps."""
        if self.control is not None:
            aim = self.target if self.config.keep_range is None else self.config.keep_ratio
            found = self.control.thresholds(aim)
            self.model.mod.thresholds.update({i: float(p) for i, p in found.items()})

    def _calibrate(self) -> None:
        batches = calibration_batches(self.source, self.config, self.latest, self.world, self.device)
        if not batches or self.config.keep_ratio == 1:
            return
        if self.compilation is not None:
            self.compilation.off()  # no compilation for eval mode
        calibrate_trained(self.model, batches, self.config, self._autocast)

    def _summed(self, counts: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(counts, "sum") if self.world > 1 else counts

    def _evaluate(self) -> dict[str, float]:
        if self.eval_source is None:
            return {}
        if self.compilation is not None:
            self.compilation.off()  # no second compilation for eval mode
        found = evaluate(
            self.model,
            self.eval_source,
            self.config.eval_batches,
            self.config.batch_size,
            self.accelerator,
            self._autocast,
            self.model.forward if self.config.compile else None,  # nor here
        )
        if self.compilation is not None:
            self.compilation.on()
        return {f"eval_{k}": v for k, v in found.items() if k in ("loss", "keep_ratio")}

    def _save(self) -> None:
        """A checkpoint that is complete or absent: written beside its place, then renamed."""
        if self.out is None or self.saved_step == self.progress.step:
            return
        progress, accelerator = self.progress, self.accelerator
        progress.window = self._read_window()
        paused = time.perf_counter()
        before = progress.seconds, progress.share
        progress.seconds, progress.share = self._seconds(), self._share()
        folder = self.out / "checkpoints"
        target, temporary = folder / f"step_{progress.step}", folder / f".step_{progress.step}.tmp"
        try:
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            with _without_tied_warning():
                accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                if target.exists():
                    shutil.rmtree(target)
                os.replace(temporary, target)
                for old in checkpoints(self.out)[: -self.config.keep_last]:
                    shutil.rmtree(old)
        except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
            shutil.rmtree(temporary, ignore_errors=True)
            raise ModlabError(
                f"Could not write the checkpoint {target}: {error}. Earlier ones are intact: free "
                "some space and continue with resume='auto'."
            ) from error
        finally:
            (progress.seconds, progress.share), progress.window = before, {}
        self.saved_step = progress.step
        self.mark += time.perf_counter() - paused

    def _finish(self, stopped: Stopped) -> TrainResult:
        config, progress, accelerator = self.config, self.progress, self.accelerator
        self._settle_thresholds()
        complete = stopped in ("finished", "data") or (stopped == "time" and self.steps is None)
        if complete:
            if progress.window_steps:
                self._log(_Quiet(), False)
            if self.config.calibrate and self.objective in ("target", "budget"):
                if self.out is not None and config.save_every:
                    self._save()  # before: a longer run goes on from the model as trained
                self._calibrate()
            if self.eval_source is not None and self.history and "eval_loss" not in self.history[-1]:
                self.history[-1] |= self._evaluate()
                self._rewrite_log()
        if self.out is not None and (not complete or config.save_every):
            self._save()
        seconds = self._seconds()
        accelerator.wait_for_everyone()
        self.close()
        if complete and self.out is not None and accelerator.is_main_process:
            # A finished run that is taken up again has nothing to add; of a stream, not even its calibration.
            new = progress.step > self.resumed_at or not (self.out / "model").exists()
            if new:
                self._save_model(self.out / "model")
        accelerator.wait_for_everyone()
        history = pd.DataFrame(self.history)
        return TrainResult(history, self.model, self.out, progress.step, progress.tokens, seconds, stopped)

    def _save_model(self, folder: Path) -> None:
        from modlab.saving.atomic import atomic_directory

        with atomic_directory(folder) as temporary:
            self.model.save_pretrained(temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)

    def _rewrite_log(self) -> None:
        if self.out is not None and self.accelerator.is_main_process:
            write_lines(self.out / "log.jsonl", self.history)

    # --- small things
    # ---------------------------------------------------------------------------------------------

    def _to_device(self, batch: Batch) -> Batch:
        check_length(
            self.model, batch["input_ids"].shape[1], "batches"
        )  # a stream's later batches may be longer
        if self.device.type == "cuda":
            return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
        return {k: v.to(self.device) for k, v in batch.items()}

    def _autocast(self) -> Any:
        """bf16 autocast around the forward alone. Not accelerate's: that one replaces `model.forward`."""
        wanted = self.config.mixed_precision
        enabled = wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else contextlib.nullcontext()

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.started

    def _share(self) -> float:
        """How much of the run is behind, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, self.progress.step / self.steps)
        if (
            self.warm is None
        ):  # the first step, which may compile for a minute, takes nothing off the schedule
            return self.progress.share
        limit, now = 60 * (self.config.max_minutes or 0.0), self._agreed(self._seconds())
        ahead = max(limit - self.warm, 1e-9)
        return min(1.0, self.progress.share + (1 - self.progress.share) * (now - self.warm) / ahead)

    def _time_left(self) -> float:
        return max(0.0, 60 * (self.config.max_minutes or 0.0) - self._seconds())

    def _out_of_time(self) -> bool:
        if self.config.max_minutes is None or self.steps is None:
            return False
        if self.world > 1 and self.progress.step % self.config.log_every:
            return False
        return self._agreed(time.perf_counter() - self.started) > 60 * self.config.max_minutes

    def _interrupted(self) -> bool:
        if self.world == 1:
            return self.stop_asked
        if self.progress.step % self.config.log_every:  # asking the other processes costs a wait
            return False
        asked = torch.tensor([float(self.stop_asked)], device=self.device)
        return float(self.accelerator.reduce(asked, "sum").item()) > 0

    def _agreed(self, seconds: float) -> float:
        """The main process's clock on every process."""
        if self.world == 1:
            return seconds
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor([seconds], dtype=torch.float32, device=self.device)).item())

    def _progress_bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=self.steps,
            initial=self.progress.step,
            desc="Training",
            unit="step",
            disable=not self.accelerator.is_main_process or self.monitor is not None,
        )


def _cast(dtypes: dict[nn.Parameter, torch.dtype]) -> None:
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _without_tied_warning() -> Iterator[None]:
    """accelerate warns at every checkpoint that tied embeddings are stored once; they are tied again on
    loading."""
    logger = logging.getLogger("accelerate.utils.other")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Quiet:
    """Stands in for the progress bar once it is closed."""

    def set_postfix_str(self, text: str) -> None:
        pass


@contextlib.contextmanager
def _interrupts(run: _Run) -> Iterator[None]:
    """The first Ctrl-C asks the run to stop after the step in flight; a second one raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        if run.stop_asked:
            raise KeyboardInterrupt
        run.stop_asked = True

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
