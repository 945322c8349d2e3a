"""The explorer: every view over one text and one model, with real runs behind the slider."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import traitlets as t

from modlab.trace import run_traced
from modlab.widgets.page import curve, payload, summary
from modlab.widgets.still import heatmap_png
from modlab.widgets.views import _TraceView

if TYPE_CHECKING:
    import pandas as pd

# One lock a model, shared by all explorers of it: in JupyterLab 4.6 callbacks run in a thread of their own,
# while a cell runs, and a threshold must not move in the middle of another run.
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def _lock_of(model: Any) -> Any:
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


class RoutingExplorer(_TraceView):
    """Slider, figures, heatmap, text and curve of one text. Made by `explore`.

    Dragging compares the recorded gates with the new p, in the browser: a preview. Releasing sets the
    model's threshold (it stays set: a later `generate` uses it) and runs the text: measured.
    """

    view = t.Unicode("explorer").tag(sync=True)

    def __init__(self, model: Any, tokenizer: Any, text: str, sweep: pd.DataFrame | None = None) -> None:
        self._model, self._tokenizer, self._text = model, tokenizer, text
        points = curve(sweep)
        with _lock_of(model):
            trace, cache = run_traced(model, tokenizer, text)
        super().__init__(trace, points=points, can_run=True, status={"state": "idle", "id": 0, "error": ""})
        self._show(trace, cache)
        self.on_msg(self._on_message)

    def run(self, p: float) -> None:
        """Set the model to threshold p, run the text, show what was measured.

        Raises:
            ModlabError: p does not lie between 0 and 1.
        """
        from modlab.routing import set_threshold

        with _lock_of(self._model):
            set_threshold(self._model, float(p))
            trace, cache = run_traced(self._model, self._tokenizer, self._text)
            self._show(trace, cache)

    def _show(self, trace: Any, cache: Any) -> None:
        measured = summary(trace, cache.nbytes, cache.dense_nbytes)
        # A number that always differs, so that a second run at the same p is seen as news too.
        measured["run"] = self.summary.get("run", 0) + 1
        self._trace = trace
        with self.hold_sync():
            new = payload(trace)
            for name in ("gates", "losses", "threshold"):
                setattr(self, name, new[name])
            self.summary = measured
            self.runs = [r for r in self.runs if r["p"] != measured["p"]] + self._point(measured)

    @staticmethod
    def _point(measured: dict[str, Any]) -> list[dict[str, float]]:
        if measured["loss"] is None or measured["varies"]:
            return []
        return [{name: measured[name] for name in ("p", "kv_bytes", "loss")}]

    def _on_message(self, _: Any, content: dict[str, Any], __: Any) -> None:
        """A run asked for by the slider. Nobody sees an exception in a callback: the widget shows it."""
        if content.get("type") != "run":
            return
        number = int(content.get("id", 0))
        self.status = {"state": "running", "id": number, "error": ""}
        error = ""
        try:
            self.run(content["p"])
        except Exception as problem:
            error = f"The run at p {content.get('p')} failed, the picture is that of the last good one.\n"
            error += f"{type(problem).__name__}: {problem}"
        self.status = {"state": "idle", "id": number, "error": error}

    def _png(self) -> bytes:
        return heatmap_png(self._trace, self.points or self.runs)


def explore(model: Any, tokenizer: Any, text: str, sweep: pd.DataFrame | None = None) -> RoutingExplorer:
    """See which layer runs which token of the text, and steer the threshold.

    Args:
        model: a converted model (`modlab.convert`, or `modlab.load` of one).
        tokenizer: the model's tokenizer.
        text: any text that fits the model's context.
        sweep: a frame of `modlab.sweep`, drawn as curve; without one, the runs made with the slider are.

    Raises:
        ModlabError: dense model, empty or too long text, a sweep without the columns needed.
    """
    return RoutingExplorer(model, tokenizer, text, sweep)
