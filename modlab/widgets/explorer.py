"""The explorer: every view over one text and one model, with real runs behind the slider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import traitlets as t

from modlab.cache_argument import given_cache
from modlab.trace import RoutingTrace, run_traced
from modlab.widgets.jobs import Job
from modlab.widgets.model_access import thresholds_restored_on_error, using
from modlab.widgets.page import curve, payload, script, summary
from modlab.widgets.still import heatmap_png
from modlab.widgets.views import ModelView, TraceView

if TYPE_CHECKING:
    import pandas as pd


class MeasuredView(TraceView, ModelView):
    """A view of one text and one model: the text runs again at other thresholds."""

    def __init__(self, model: Any, tokenizer: Any, text: str, **traits: Any) -> None:
        self._model, self._tokenizer, self._text = model, tokenizer, text
        with using(model):
            trace, output = run_traced(model, tokenizer, text)
        super().__init__(trace, **traits)
        self._show(trace, given_cache(output))

    def _measure(self, p: float | dict[int, float], job: Job | None) -> None:
        """Set the thresholds, run the text, show what was measured."""
        from modlab.routing import set_threshold

        with using(self._model, job, "Running the text"), thresholds_restored_on_error(self._model):
            set_threshold(self._model, p)
            trace, output = run_traced(self._model, self._tokenizer, self._text)
            self._show(trace, given_cache(output))

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        measured = summary(trace, cache.nbytes, cache.dense_nbytes)
        # A number that always differs, so that a second run at the same p is seen as news too.
        measured["run"] = self.summary.get("run", 0) + 1
        self._trace = trace
        with self.hold_sync():
            new = payload(trace)
            for name in ("gates", "losses", "threshold"):
                setattr(self, name, new[name])
            if self.layer_thresholds:
                self.layer_thresholds = measured["ps"]
            self.summary = measured


class RoutingExplorer(MeasuredView):
    """Slider, figures, heatmap, text, path and curve of one text. Made by `explore`.

    Dragging compares the recorded gates with the new p, in the browser: a preview. Releasing sets the
    model's threshold (it stays set: a later `generate` uses it) and runs the text: measured.
    """

    _esm = script("explorer")
    view = t.Unicode("explorer").tag(sync=True)

    def __init__(self, model: Any, tokenizer: Any, text: str, sweep: pd.DataFrame | None = None) -> None:
        super().__init__(model, tokenizer, text, points=curve(sweep))

    def run(self, p: float) -> None:
        """Set the model to threshold p, run the text, show what was measured.

        Raises:
            ModlabError: p does not lie between 0 and 1.
        """
        self._measure(float(p), None)

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        super()._show(trace, cache)
        measured = self.summary
        self.runs = [r for r in self.runs if r["p"] != measured["p"]] + self._point(measured)

    @staticmethod
    def _point(measured: dict[str, Any]) -> list[dict[str, float]]:
        if measured["loss"] is None or measured["varies"]:
            return []
        return [{name: measured[name] for name in ("p", "kv_bytes", "loss")}]

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "run":
            return None
        return lambda job: self._measure(float(content["p"]), job)

    def _failure(self, content: dict[str, Any]) -> str:
        return f"The run at p {content.get('p')} failed, the picture is that of the last good one."

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
