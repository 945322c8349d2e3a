"""TrainingPanel: `modlab.train` in a thread, watched and steered from the notebook."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets as t

from modlab.errors import ModlabError
from modlab.hf.model import model_name
from modlab.training.config import TrainConfig
from modlab.widgets.model_access import lock_of
from modlab.widgets.pictures.panels import training_svg
from modlab.widgets.views import View

if TYPE_CHECKING:
    import pandas as pd

    from modlab.training.result import TrainResult

ROWS = 400  # log lines sent to the browser; of a longer history, means of neighbours
TELL_EVERY = 0.25  # seconds between two messages to the browser
YIELD = 0.0005  # seconds a step that other widgets get to take the model


class TrainingPanel(View, view="training"):
    """A training run with its curves, and buttons that start, pause, resume and stop it.

    The run has a thread of its own: other cells run, and other widgets of the model answer between two steps.
    `wait()` in a later cell waits for the end; in JupyterLab the buttons work even then.

    Args:
        model, batches, config, eval_data, teacher, tokenizer: as `modlab.train` takes them.

    Attributes:
        progress: state ("ready", "running", "paused", "stopping", "finished", "stopped" or "failed"), text,
            fraction (0..1), left (seconds, None if unknown), error.
        result: the TrainResult once the run is over, else None.
    """

    progress = t.Dict().tag(sync=True)
    columns = t.List(t.Unicode()).tag(sync=True)
    series = t.Bytes(b"").tag(sync=True)  # float32[columns, rows]

    def __init__(
        self,
        model: Any,
        batches: Any,
        config: TrainConfig,
        *,
        eval_data: Any = None,
        teacher: Any = None,
        tokenizer: Any = None,
    ) -> None:
        config.check()
        self._model, self._batches, self._config = model, batches, config
        self._more = {"eval_data": eval_data, "teacher": teacher, "tokenizer": tokenizer}
        self._changed = threading.Condition()
        self._paused = self._stopping = False
        self._seen: set[Any] = set()  # numbers of the browser's messages
        # Not the thread itself: one whose join was interrupted counts as dead in Python 3.11.
        self._over: threading.Event | None = None
        self._rows: list[dict[str, Any]] = []
        self._told = self._seconds = 0.0
        self._error: BaseException | None = None
        self.result: TrainResult | None = None
        super().__init__(can_run=True, summary={"model": model_name(model)}, progress=_ready(config))
        self.on_msg(self._on_message)

    def start(self) -> None:
        """Begin, in the background.

        After a stop: take up the run's folder again if it has one (`config.out`), else begin a new run from
        the weights as they are.

        Raises:
            ModlabError: the run is going on already.
        """
        with self._changed:
            if self.running:
                raise ModlabError("The run is going on already: pause() or stop() it, or wait() for its end.")
            config = self._config
            if self.result is not None and config.out is not None:
                config = replace(config, resume="auto")
            self._paused = self._stopping = False
            self._rows, self._error, self.result = [], None, None
            self._began, self._seconds = time.monotonic(), 0.0
            self._tell("running", "Preparing the run.", 0.0)
            self._over = threading.Event()
            threading.Thread(
                target=self._train, args=(config, self._over), name="modlab-train", daemon=True
            ).start()

    def pause(self) -> None:
        """Wait after the step in flight, until `resume` or `stop`. The model can be used meanwhile."""
        with self._changed:
            self._paused = self.running
            self._changed.notify_all()

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def stop(self) -> None:
        """End after the step in flight; with a folder, a checkpoint is saved there."""
        with self._changed:
            if self.running:
                self._stopping, self._paused = True, False
                self._tell("stopping", "Stopping after this step.")
                self._changed.notify_all()

    @property
    def running(self) -> bool:
        """Whether a run has begun and is not over, paused or not."""
        return self._over is not None and not self._over.is_set()

    @property
    def history(self) -> pd.DataFrame:
        """The log lines so far, as `TrainResult.history`."""
        import pandas as pd

        return pd.DataFrame(list(self._rows))

    def wait(self, timeout: float | None = None) -> TrainResult | None:
        """Until the run is over. Ctrl-C or the kernel's interrupt button stops the run, not only the waiting.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            the result, or None if the time ran out.

        Raises:
            ModlabError: the run was not started, or it failed (then with its own error).
        """
        over = self._over
        if over is None:
            raise ModlabError("The run was not started: call start(), or press the panel's Start button.")
        try:
            over.wait(timeout)
        except KeyboardInterrupt:
            self.stop()
            over.wait()
        if self._error is not None:
            raise self._error
        return self.result

    def _on_message(self, _: Any, content: dict[str, Any], __: Any) -> None:
        act = {"start": self.start, "pause": self.pause, "resume": self.resume, "stop": self.stop}
        if content.get("id", 0) in self._seen:  # the browser sends again what seems to be lost
            return
        self._seen.add(content.get("id"))
        try:
            act.get(content.get("type", ""), lambda: None)()
        except ModlabError as problem:
            self.progress = {**self.progress, "error": str(problem)}

    def _train(self, config: TrainConfig, over: threading.Event) -> None:
        from modlab.training.loop import train

        try:
            with lock_of(self._model):
                result = train(self._model, self._batches, config, monitor=_Watch(self), **self._more)
            self._finish(result, config)
        except Exception as problem:
            self._error = problem
            self._tell("failed", "The run failed.", error=f"{type(problem).__name__}: {problem}")
        finally:
            over.set()

    def _finish(self, result: TrainResult, config: TrainConfig) -> None:
        self.result = result
        self._rows = result.history.to_dict("records")  # with the evaluation at the end
        self._send_curves()
        if result.interrupted:
            again = "Train on takes it up again." if config.out else "Train on begins a new run from here."
            self._tell("stopped", f"Stopped after {result.steps:,} steps. {again}")
        else:
            done = f"{result.steps:,} steps in {result.seconds:,.0f} s. {result.kept_in}"
            self._tell("finished", done, 1.0)

    def _after_step(self, step: int, share: float) -> bool:
        """Tells the browser now and then, waits while paused, says whether to go on."""
        with self._lent():
            time.sleep(YIELD)
            if self._paused:
                self._wait_paused(step, share)
        now = time.monotonic()
        if now - self._told >= TELL_EVERY and not self._stopping:
            self._tell("running", f"Step {step:,}.", share)
        return not self._stopping

    def _wait_paused(self, step: int, share: float) -> None:
        since = time.monotonic()
        self._send_curves()
        self._tell("paused", f"Paused after step {step:,}. The model can be used meanwhile.", share)
        with self._changed:
            self._changed.wait_for(lambda: not self._paused)
        self._began += time.monotonic() - since
        if not self._stopping:
            self._tell("running", f"Step {step:,}.", share)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Inside this block other widgets may use the model, in eval mode, and leave it as it is."""
        lock = lock_of(self._model)
        lock.release()
        try:
            yield
        finally:
            lock.acquire()

    def _tell(self, state: str, text: str, share: float | None = None, error: str = "") -> None:
        share = float(self.progress.get("fraction", 0.0)) if share is None else share
        spent = time.monotonic() - self._began if hasattr(self, "_began") else 0.0
        left = spent * (1 - share) / share if state == "running" and share > 0 else None
        if state == "running" and self._rows:
            self._send_curves()
        self._told = time.monotonic()
        self.progress = {"state": state, "text": text, "fraction": share, "left": left, "error": error}

    def _send_curves(self) -> None:
        """The curves, thinned to ROWS points."""
        rows = list(self._rows)
        names = [name for name in _names(rows) if name == "step" or _is_number(rows, name)]
        table = np.asarray([[_float(row.get(name)) for row in rows] for name in names], dtype=np.float64)
        table = thinned(table, ROWS)
        with self.hold_sync():
            self.columns = names
            self.series = table.astype("<f4").tobytes()

    def _svg(self) -> str:
        rows = np.frombuffer(self.series, "<f4").reshape(len(self.columns) or 1, -1)
        return training_svg(dict(zip(self.columns, rows, strict=False)))


class _Watch:
    """The panel as a `Monitor` (widgets have a `log` of another kind)."""

    def __init__(self, panel: TrainingPanel) -> None:
        self.step = panel._after_step
        self._rows = panel._rows

    def log(self, row: dict[str, Any]) -> None:
        """Keeps the line; `step` sends it, not too often."""
        self._rows.append(dict(row))


def thinned(table: Any, count: int) -> Any:
    """float64[names, at most `count`]: means over groups of neighbouring lines; NaN only where all are."""
    n = table.shape[-1]
    if n <= count:
        return table
    group = math.ceil(n / count)
    parts = [table[:, i : i + group] for i in range(0, n, group)]
    known = [np.where(np.isnan(part), 0, part).sum(1) for part in parts]
    counts = [(~np.isnan(part)).sum(1) for part in parts]
    with np.errstate(invalid="ignore"):
        return np.stack([k / np.where(c, c, np.nan) for k, c in zip(known, counts, strict=True)], axis=1)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def _is_number(rows: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), (int, float)) for row in rows)


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _ready(config: TrainConfig) -> dict[str, Any]:
    length = {
        "steps": config.steps and f"{config.steps:,} steps",
        "tokens": config.tokens and f"{config.tokens:,} tokens",
    }
    what = length["steps"] or length["tokens"] or f"{config.max_minutes:g} minutes"
    return {"state": "ready", "text": f"A run of {what}.", "fraction": 0.0, "left": None, "error": ""}
