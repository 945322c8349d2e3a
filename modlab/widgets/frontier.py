"""Frontier: loss against cache bytes or latency, with a point to drag that sets the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets as t

from modlab.errors import ModlabError
from modlab.routing.threshold import check_threshold
from modlab.widgets.model_access import using
from modlab.widgets.pictures.panels import frontier_svg
from modlab.widgets.views import ModelView

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("kv_bytes", "prefill_ms", "decode_ms")


class Frontier(ModelView, view="frontier"):
    """What each threshold costs in loss and buys in bytes or milliseconds, as one curve with a chosen point.

    Args:
        sweep: a frame of `modlab.sweep`; columns without a value in every row are not offered.
        model: a converted model: releasing the point sets its threshold. None: the point is only read.
        references: further points to compare with, by name, each with some of loss, kv_bytes, prefill_ms,
            decode_ms; one whose name begins with "dense" is what the gains are told against.
        metric: what is drawn first.
        elsewhere: milliseconds measured on another machine or model, by name: frames of
            `modlab.published.latencies`. Each can be chosen as the horizontal axis: the loss is this model's,
            the time is that of the other one at the same keep ratio.
        p: where the point begins; by default the row nearest to p = 0.5.

    Attributes:
        threshold: the chosen p.
        applied: the p that was set in the model, -1 for none yet.
    """

    points = t.List(t.Dict()).tag(sync=True)
    references = t.List(t.Dict()).tag(sync=True)
    elsewhere = t.List(t.Dict()).tag(sync=True)
    metric = t.Unicode("kv_bytes").tag(sync=True)
    threshold = t.Float(0.5).tag(sync=True, echo_update=False)
    applied = t.Float(-1.0).tag(sync=True)

    def __init__(
        self,
        sweep: pd.DataFrame,
        model: Any = None,
        references: Mapping[str, Mapping[str, float]] | None = None,
        metric: str = "kv_bytes",
        p: float | None = None,
        elsewhere: Mapping[str, pd.DataFrame] | None = None,
    ) -> None:
        from modlab.hf.model import model_name

        points = _points(sweep)
        others = [
            {"name": str(name), **{k: float(v) for k, v in values.items()}}
            for name, values in (references or {}).items()
        ]
        axes = [
            _add_axis(f"elsewhere_{i}", name, frame, points, others)
            for i, (name, frame) in enumerate((elsewhere or {}).items())
        ]
        if metric not in METRICS or metric not in points[0]:
            offered = [name for name in METRICS if name in points[0]]
            raise ModlabError(f"metric={metric!r} is not in the sweep; it has {', '.join(offered)}.")
        start = min((d["p"] for d in points), key=lambda x: abs(x - 0.5)) if p is None else float(p)
        self._model = model
        super().__init__(
            points=points,
            references=others,
            elsewhere=axes,
            metric=metric,
            threshold=start,
            can_run=model is not None,
            summary={"model": model_name(model) if model is not None else ""},
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
        return frontier_svg(self.points, self.references, self.metric, self.threshold)


def _points(sweep: pd.DataFrame) -> list[dict[str, float]]:
    """Rows of a sweep for js/frontier.js, by ascending p; columns with gaps are left out."""
    need = ["threshold", "loss", "keep_ratio", "kv_bytes"]
    missing = [name for name in need if name not in sweep.columns]
    if missing:
        raise ModlabError(
            f"The sweep has no column {', '.join(missing)}; it has {', '.join(map(str, sweep.columns))}. "
            "Pass the frame that modlab.sweep(model, tokenizer, texts, thresholds=...) returns."
        )
    frame = sweep.sort_values("threshold")
    names = [*need, *(m for m in METRICS[1:] if m in frame and frame[m].notna().all())]
    rows = frame[names].dropna().astype(float).rename(columns={"threshold": "p"})
    if len(rows) < 2:
        raise ModlabError(f"A frontier needs two thresholds or more; the sweep has {len(rows)}.")
    return [{str(k): float(v) for k, v in row.items()} for row in rows.to_dict("records")]


def _add_axis(
    metric: str,
    name: str,
    frame: pd.DataFrame,
    points: list[dict[str, float]],
    references: list[dict[str, Any]],
) -> dict[str, str]:
    """Puts the times of another machine into points and dense references; returns what names the axis."""
    missing = [column for column in ("keep_ratio", "dense_ms", "mod_ms") if column not in frame.columns]
    if missing:
        raise ModlabError(
            f"elsewhere[{name!r}] has no column {', '.join(missing)}; give a frame of "
            "modlab.published.latencies."
        )
    frame = frame.sort_values("keep_ratio")
    for point in points:
        # Outside of what was measured: the time at the nearest keep ratio that was.
        point[metric] = float(np.interp(point["keep_ratio"], frame["keep_ratio"], frame["mod_ms"]))
    for reference in references:
        if reference["name"].startswith("dense"):
            reference[metric] = float(frame["dense_ms"].iloc[0])
    origin = frame.attrs.get("origin", "")
    note = f"Horizontal: {origin or name}, at the keep ratio that this model has at p. "
    return {"metric": metric, "title": str(name), "note": note + "Vertical: this model's loss."}
