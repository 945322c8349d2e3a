"""`modlab.train`: one accelerate loop for dense pre-training, conversion and continuation.

The device is waited for only at log steps, evaluations and checkpoints. Every step's data, learning rate,
target, what-if flag and routing noise follow from its number (or the clock, if `max_minutes` alone sets the
length), which is what lets a resumed run repeat the uninterrupted one bit for bit.

On several processes (`accelerate launch`) each gets its rows of the same global batch, and the gradient is
that of one process with all of them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from modlab.training.config import TrainConfig
from modlab.training.monitor import Monitor
from modlab.training.result import Stopped, TrainResult
from modlab.training.run import Run

__all__ = ["TrainConfig", "TrainResult", "train"]


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
        batches: `data.packed(...)`, any data set of rows or iterable of batches; see `training/loader.py`.
            Labels are `labels` if there are any, else the input ids. Nothing that is padding counts.
        config: see `TrainConfig`.
        eval_data: held-out data, any of the same kinds.
        teacher: a dense model with the same vocabulary, for `config.kl`.
        tokenizer: saved with the final model.
        monitor: told of every step and log line, may pause the run and end it; replaces the progress bar.

    Returns:
        TrainResult. Ctrl-C ends the run after the step in flight, saves a checkpoint if there is an `out`
        folder, and returns with `interrupted` set (a second Ctrl-C raises).

    Raises:
        ModlabError: bad settings or data, before anything is written; a loss that is not finite, with the
            last checkpoint kept.
    """
    run = Run(
        model, batches, config, eval_data=eval_data, teacher=teacher, tokenizer=tokenizer, monitor=monitor
    )
    return train_run(run)


def train_run(run: Run) -> TrainResult:
    """Trains a run to its end."""
    with run:
        with run.progress_bar() as bar, _stopped_by_ctrl_c(run):
            try:
                stopped = _loop(run, bar)
            except KeyboardInterrupt:
                if run.half_updated:  # only the last checkpoint is sound
                    raise
                run.stepping.forget()
                stopped = "interrupted"
        return run.finish(stopped)


def _loop(run: Run, bar: Any) -> Stopped:
    """Step after step, until the run is done or is stopped; why it ended."""
    batches = run.batches()
    while not run.is_done:
        parts = next(batches, None)
        if parts is None:
            return "data"
        run.train_step(parts)
        bar.update()
        if run.is_log_step:
            bar.set_postfix_str(_shown(run, run.log(evaluated=run.is_eval_step)))
        if run.is_save_step:
            run.save()
        if not run.monitored():
            run.stop_asked = True
        if run.is_interrupted:
            return "interrupted"
        if run.is_out_of_time:
            return "time"
    return "finished"


def _shown(run: Run, row: dict[str, Any]) -> str:
    """A log line in short, for the progress bar."""
    shown = [f"{name} {row[name]:.3f}" for name in ("loss", "kl", "eval_loss", "keep_ratio") if name in row]
    if "target" in row:
        shown[-1] += f" (target {row['target']:.3f})"
    shown.append(f"{row['tokens_per_s']:,.0f} tok/s")
    if run.steps is None:
        shown.append(f"left {run.clock.left:.0f} s")
    return ", ".join(shown)


@contextlib.contextmanager
def _stopped_by_ctrl_c(run: Run) -> Iterator[None]:
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
