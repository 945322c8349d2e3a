"""Frontier: memory, time and quality of each operating point at once, with a point to drag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import traitlets as t

from modlab.errors import ModlabError
from modlab.routing.threshold import check_threshold
from modlab.widgets.frontier_lines import Times, measured_line, published_line
from modlab.widgets.model_access import trained_for, using
from modlab.widgets.pictures.panels import frontier_svg
from modlab.widgets.views import ModelView

if TYPE_CHECKING:
    import pandas as pd


class Frontier(ModelView, view="frontier"):
    """What each operating point loses, against what it takes in memory and in time: one point on both curves.

    Args:
        sweep: a frame of `modlab.sweep`; columns without a value in every row are not offered. None:
            published lines alone.
        model: a converted model: releasing the point sets its threshold. None: the point is only read.
        references: further points to compare with, by name, each with some of loss, kv_bytes, prefill_ms,
            decode_ms; one whose name begins with "dense" is what the gains are told against.
        time: the key of the time that is drawn first; by default the one for a further token.
        elsewhere: milliseconds measured on another machine or model, by name: frames of
            `modlab.published.latencies`. The loss is this model's, the time is that of the other one at the
            same keep ratio.
        real: further lines, of real models, by name: frames of `modlab.published.real_models`.
        real_times: milliseconds for these, by name: frames of `modlab.published.kv_latencies`.
        p: where the point begins; by default the row nearest to the model's threshold, or to 0.5.

    Attributes:
        lines: what can be shown (see `frontier_lines`), this machine's sweep first.
        line: index of the one that shows.
        threshold: the chosen p of the sweep.
        saving: the chosen KV saving of a real model's line.
        quality: key of the axis from top to bottom, of those that the line has; "" for its first.
        time: key of the axis of the second curve; "" for the line's first.
        applied: the p that was set in the model, -1 for none yet.
    """

    lines = t.List(t.Dict()).tag(sync=True)
    line = t.Int(0).tag(sync=True)
    threshold = t.Float(0.5).tag(sync=True, echo_update=False)
    saving = t.Float(4.0).tag(sync=True, echo_update=False)
    quality = t.Unicode("").tag(sync=True)
    time = t.Unicode("").tag(sync=True)
    applied = t.Float(-1.0).tag(sync=True)

    def __init__(
        self,
        sweep: pd.DataFrame | None = None,
        model: Any = None,
        references: Mapping[str, Mapping[str, float]] | None = None,
        time: str = "",
        p: float | None = None,
        elsewhere: Times | None = None,
        real: Times | None = None,
        real_times: Times | None = None,
    ) -> None:
        from modlab.hf.model import model_name
        from modlab.routing.state import gated_routing_of

        lines = [] if sweep is None else [measured_line(sweep, references or {}, elsewhere or {})]
        lines += [published_line(name, frame, real_times or {}) for name, frame in (real or {}).items()]
        if not lines:
            raise ModlabError("Nothing to draw: give a sweep, or real=modlab.published.real_models().")
        times = [axis["key"] for axis in lines[0]["costs"] if axis["unit"] == "ms"]
        if time and time not in times:
            raise ModlabError(f"time={time!r} was not measured; there is {', '.join(times) or 'none'}.")
        known = {} if model is None else trained_for(model)
        self._model: Any = model if sweep is not None else None
        if self._model is not None:
            gated_routing_of(self._model)
        super().__init__(
            lines=lines,
            time=time or ("decode_ms" if "decode_ms" in times else ""),
            threshold=_start(lines, p, model),
            can_run=self._model is not None,
            summary={
                "model": model_name(model) if model is not None else "",
                "trained": known,
            },
        )

    def choose(self, p: float) -> None:
        """Move the point to p and, if there is a model, set its threshold.

        Raises:
            ModlabError: p is below 0, or not below 1.
        """
        self.threshold = check_threshold(p)
        if self._model is not None:
            self._set(self.threshold)

    def _set(self, p: float) -> None:
        from modlab.routing.state import set_threshold

        with using(self._model):
            set_threshold(self._model, p)
        self.applied = p

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "set" or self._model is None:
            return None
        return lambda job: self._set(float(content["p"]))

    def _svg(self) -> str:
        line = self.lines[self.line]
        return frontier_svg(line, getattr(self, line["dial"]), self.quality, self.time)


def _start(lines: list[dict[str, Any]], p: float | None, model: Any) -> float:
    """The p at which the point begins."""
    if p is not None:
        return check_threshold(p)
    if lines[0]["dial"] != "threshold":
        return 0.5
    there = 0.5 if model is None else min(model.mod.thresholds.values())
    return float(min((point["at"] for point in lines[0]["points"]), key=lambda at: abs(at - there)))
