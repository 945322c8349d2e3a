"""The explorer: every view over one text and one model, with real runs behind the slider."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets as t

from modlab.config import KV_BITS
from modlab.errors import ModlabError
from modlab.hf.model import context_length, device_of, model_name
from modlab.hf.names import given_cache
from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.run import run_traced
from modlab.widgets.jobs import Job
from modlab.widgets.model_access import using
from modlab.widgets.pictures.page import MAX_TOKENS, by_ratio, curve, keeping_one_in
from modlab.widgets.pictures.trace import trace_svg
from modlab.widgets.steered import SteeredView
from modlab.widgets.yardsticks import NEW_TOKENS, far_recall, mean, stderr, times

if TYPE_CHECKING:
    import pandas as pd

    from modlab.config import KVCacheDtype

CURVE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RATIOS = (1.5, 2, 3, 4, 6, 8, 12, 16)
"""One token in so many is kept: for gates of real models, among which p itself tells little."""

Stored = tuple[int, str]
"""What else than thresholds decides what a cache takes: `RoutingTrace.keep_recent` and `kv_cache_dtype`."""


class RoutingExplorer(SteeredView, view="explorer"):
    """Slider, figures, heatmap, text, path and curve of one text. Made by `explore`.

    Dragging compares the recorded gates with the new p, in the browser: a preview. Releasing sets the
    model's threshold (it stays set: a later `generate` uses it) and runs the text: measured. Another text is
    pasted, or opened from a file, in the widget; a curve that was there is measured again for it, for another
    number of recent tokens, which a cell may have set, and for other bits of keys and values, for which there
    is a switch next to the title.

    Attributes:
        forms: what each of the models routes, as the switch names it; form: the one that shows.
        speed: once measured, p, tokens (of the prompt), device, and for "routed" and "dense" (the model with
            routing off, where there is no other): first_ms (to the first token of `generate`) and next_ms
            (for each further one).
    """

    speed = t.Dict().tag(sync=True)
    forms = t.List(t.Unicode()).tag(sync=True)
    form = t.Unicode("").tag(sync=True)

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        sweep: pd.DataFrame | None = None,
        dense: Any = None,
        others: Sequence[Any] = (),
    ) -> None:
        points = curve(sweep)
        self._by_form = _by_form([model, *others])
        self._wanted = [point["p"] for point in points]
        # Points of a curve that is not complete yet, by p and how the cache is: a cell may change that.
        self._found: dict[tuple[float, Stored], dict[str, float]] = {}
        self._stored = _stored_by(model)  # with which runs, points and speed were measured
        forms = list(self._by_form)
        super().__init__(model, tokenizer, text, dense=dense, points=points, forms=forms, form=forms[0])

    def switch(self, form: str) -> None:
        """Show what another of the models does with the text, and steer that one.

        Args:
            form: one of `forms`.

        Raises:
            ModlabError: there is no such model.
        """
        self._switch(form, None)

    def _switch(self, form: str, job: Job | None) -> None:
        if form not in self._by_form:
            raise ModlabError(f"no model here routes {form!r}; there are {', '.join(self.forms)}.")
        model = self._by_form[form]
        with using(model, job, f"Running the text, {form} routed"):
            trace, output = run_traced(model, self._tokenizer, self.text)
            if job is not None:
                job.check()
            with self.hold_sync():
                self._model, self.form = model, form
                self.cursor, self.locked, self.layer = -1, False, -1
                self._take(trace, output)
                self.budget = self._budget()
        self._refine(job)

    def store_in(self, dtype: KVCacheDtype) -> None:
        """Set how the model stores keys and values (`modlab.set_kv_cache_dtype`), and run the text.

        Args:
            dtype: "auto", "int8" or "k6v4".

        Raises:
            ModlabError: the model cannot store them so.
        """
        self._store_in(dtype, None)

    def _store_in(self, dtype: str, job: Job | None) -> None:
        from modlab.conversion.ranges import set_kv_cache_dtype

        model, before = self._model, self._model.mod.config.kv_cache_dtype
        with using(model, job, "Running the text"):
            set_kv_cache_dtype(model, dtype)
            try:
                trace, output = run_traced(model, self._tokenizer, self.text)
            except BaseException:
                set_kv_cache_dtype(model, before)
                raise
            self._take(trace, output)
        self._refine(job)

    def run(self, p: float) -> None:
        """Set the model to threshold p, run the text, show what was measured.

        Raises:
            ModlabError: p is below 0, or not below 1.
        """
        self._measure(float(p), None)

    def measure_curve(self, thresholds: Sequence[float] | None = None) -> None:
        """Run the text at each of these thresholds, for the curve; the model's own are in place again after.

        Args:
            thresholds: values in [0, 1); 0 stands for everything kept. By default ten from 0 to 0.9, or,
                where the slider asks which share is kept, those that keep one token in RATIOS.

        Raises:
            ModlabError: a threshold of another kind.
        """
        self._start_curve(thresholds, None)

    def _start_curve(self, thresholds: Sequence[float] | None, job: Job | None) -> None:
        if thresholds is None:
            thresholds = [0.0, *keeping_one_in(self._trace, RATIOS)] if by_ratio(self._trace) else CURVE
        self._wanted, self._found = sorted({float(p) for p in thresholds}), {}
        self._measure_curve(job)

    def _measure_curve(self, job: Job | None) -> None:
        """Measure what is missing of the curve: a newer request may have stopped it half-way."""
        from modlab.routing.state import thresholds_restored

        if _stored_by(self._model)[1] != self._trace.kv_cache_dtype:
            # What points are compared with is to be measured anew; `_refine` comes back here then.
            self._measure(dict(self._model.mod.thresholds), job)
            return
        self._measure_recall(job)
        count = len(self._wanted)
        while missing := [p for p in self._wanted if (p, _stored_by(self._model)) not in self._found]:
            p, index = missing[0], self._wanted.index(missing[0])
            text, part = f"Measuring the curve, p {p:g}", (index / count, (index + 1) / count)
            with using(self._model, job, text, part=part), thresholds_restored(self._model):
                trace, output, recall = self._at(p)
            bytes_there = float(given_cache(output).nbytes)
            self._found[p, _stored_in(trace)] = self._point_at(p, trace, bytes_there, recall)
        self._with(_stored_by(self._model))
        found = [self._found[p, self._stored] for p in self._wanted]
        self.points = [point for point in found if not math.isnan(point["loss"])]
        if _stored_in(self._trace) != self._stored:
            self._measure(dict(self._model.mod.thresholds), job)  # what shows, too

    def _measure_recall(self, job: Job | None) -> None:
        """Far recall of what the curve is compared with, if it is not known yet."""
        if self._open is None or len(self._open.recall_P):
            return
        with using(self._model, job, "Measuring far recall with everything kept"), self._all_kept():
            self._open = replace(self._open, recall_P=self._recall_of(self._model))
        if self._control is not None:
            with using(self._dense, job, "Measuring far recall of the dense model"):
                self._control = replace(self._control, recall_P=self._recall_of(self._dense))
        self._tell_known()

    def _recall_of(self, model: Any) -> Any:
        return far_recall(model, self._tokenizer, self.text)

    def _at(self, p: float) -> Any:
        """(trace, output, far recall) of the text at p."""
        from modlab.routing.state import set_threshold

        if p == 0:
            assert self._open is not None
            return *self._at_rest(), self._open.recall_P
        set_threshold(self._model, p)
        return *run_traced(self._model, self._tokenizer, self.text), self._recall_of(self._model)

    def _point_at(self, p: float, trace: RoutingTrace, kv_bytes: float, recall_P: Any) -> dict[str, Any]:
        """One point of the curve: bytes, loss and far recall, with the standard errors of the latter two
        against what they are compared with."""
        base = self._control or self._open
        assert base is not None
        return {
            "p": p,
            "kv_bytes": kv_bytes,
            "keep_ratio": float(trace.keep.mean()) if p else 1.0,
            "loss": trace.mean_loss,
            "loss_stderr": stderr(trace.loss[1:].astype(np.float64), base.loss_T),
            "recall": mean(recall_P) if len(recall_P) else None,
            "recall_stderr": stderr(recall_P, base.recall_P),
        }

    def measure_speed(self) -> dict[str, Any]:
        """Time `generate` on the text at the present thresholds, and the dense model's.

        Returns:
            `speed`.
        """
        self._measure_speed(None)
        return dict(self.speed)

    def _measure_speed(self, job: Job | None) -> None:
        limit = (context_length(self._model) or MAX_TOKENS) - NEW_TOKENS - 1
        ids = self._trace.token_ids[:limit].tolist()
        with using(self._model, job, by_layer=False):
            p = self.summary["p"]
            found = times(self._model, self._dense, ids, job)
        self.speed = {"p": p, "tokens": len(ids), "device": str(device_of(self._model)), **found}

    def _refine(self, job: Job | None) -> None:
        super()._refine(job)
        if self._wanted and not self.points:
            self._measure_curve(job)

    def _take(self, trace: RoutingTrace, output: Any) -> None:
        self.points, self.runs, self._found, self.speed = [], [], {}, {}
        super()._take(trace, output)

    def _with(self, stored: Stored) -> None:
        """What was measured with other recent tokens, or other bits, is forgotten."""
        if stored != self._stored:
            self._stored, self.points, self.runs, self.speed = stored, [], [], {}

    def _known(self) -> dict[str, Any]:
        may = "kv_cache_dtype" in self._model.mod.skip.settings
        return {**super()._known(), "stored_in": {"auto": "the model's own type", **KV_BITS} if may else {}}

    def _show(self, trace: RoutingTrace, cache: Any) -> None:
        self._with(_stored_in(trace))
        super()._show(trace, cache)
        measured = self.summary
        self.runs = [r for r in self.runs if r["p"] != measured["p"]] + self._point(measured)

    @staticmethod
    def _point(measured: dict[str, Any]) -> list[dict[str, float]]:
        if measured["loss"] is None or measured["varies"]:
            return []
        return [{name: measured[name] for name in ("p", "kv_bytes", "loss", "keep_ratio")}]

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") == "run":
            return lambda job: self._measure(float(content["p"]), job)
        if content.get("type") == "curve":
            return lambda job: self._start_curve(None, job)
        if content.get("type") == "form":
            return lambda job: self._switch(str(content["form"]), job)
        if content.get("type") == "store in":
            return lambda job: self._store_in(str(content.get("dtype")), job)
        if content.get("type") == "speed":
            return self._measure_speed
        return super()._work(content)

    def _failure(self, content: dict[str, Any]) -> str:
        if content.get("type") != "run":
            return super()._failure(content)
        return f"The run at p {content.get('p')} failed, the picture is that of the last good one."

    def _svg(self) -> str:
        return trace_svg(self._trace, self.points or self.runs, self.summary.get("dense_loss"))


def explore(
    model: Any,
    tokenizer: Any,
    text: str,
    sweep: pd.DataFrame | None = None,
    dense: Any = None,
    others: Sequence[Any] = (),
) -> RoutingExplorer:
    """See which layer runs which token of the text, and steer the threshold.

    Args:
        model: a converted model whose gates decide (`modlab.convert`, or `modlab.load` of one).
        tokenizer: the model's tokenizer.
        text: any text that fits the model's context; another one can be put in in the widget.
        sweep: a frame of `modlab.sweep`, drawn as curve; without one, the runs made with the slider are.
        dense: a dense model of the same tokenizer, to compare loss, far recall and time with: the one that
            was converted, or a control that was trained on for as long. Without it, the same weights with
            everything kept are compared with.
        others: further converted models of the same tokenizer: a switch changes between them.

    Raises:
        ModlabError: dense model, one in which no gate decides (`skip="prompt"`), empty or too long text, a
            sweep without the columns needed.
    """
    return RoutingExplorer(model, tokenizer, text, sweep, dense, others)


def _stored_in(trace: RoutingTrace) -> Stored:
    return trace.keep_recent, trace.kv_cache_dtype


def _stored_by(model: Any) -> Stored:
    """What a trace of the model would say now."""
    return int(model.mod.config.recent_stored), model.mod.config.kv_cache_dtype


def _by_form(models: Sequence[Any]) -> dict[str, Any]:
    """Models by what they route, with their names where two route the same."""
    from modlab.routing.state import gated_routing_of

    found: dict[str, Any] = {}
    for number, model in enumerate(models, start=1):
        form = gated_routing_of(model).skip.words.routed
        found[form if form not in found else f"{form}, {model_name(model)} ({number})"] = model
    return found
