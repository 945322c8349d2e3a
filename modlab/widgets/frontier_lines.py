"""Lines of the frontier: operating points of a model, what each takes in memory and time, and what it loses.

A line is what js/frontier.js draws: name, dial (the trait that its point moves: "threshold" or "saving"),
points ({at, and a value for each axis}), references ({name, values}), costs and qualities (axes: {key, title,
unit, note}), note (where its figures come from). On every axis less is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from modlab.errors import ModlabError

if TYPE_CHECKING:
    import pandas as pd

Axis = dict[str, str]
Line = dict[str, Any]
Times = Mapping[str, "pd.DataFrame"]

COSTS = {
    "kv_bytes": ("KV cache", "bytes"),
    "prefill_ms": ("time to the first token", "ms"),
    "decode_ms": ("time for a further token", "ms"),
}
QUALITIES = {
    "loss": ("loss, nats a token", "nats"),
    "recall_loss": ("loss on repeated passages", "nats"),
}


def measured_line(
    sweep: pd.DataFrame, references: Mapping[str, Mapping[str, float]], elsewhere: Times
) -> Line:
    """The line of a frame of `modlab.sweep`; columns with a gap are not offered.

    Args:
        references: further points by name, each with some of the columns.
        elsewhere: frames of `modlab.published.latencies` by name: milliseconds of another machine, put at the
            keep ratio that this model has.

    Raises:
        ModlabError: a column is missing, or there are less than two thresholds.
    """
    points = _points(sweep)
    others = [
        {"name": str(n), **{k: float(v) for k, v in values.items()}} for n, values in references.items()
    ]
    costs = [_axis(key, *what) for key, what in COSTS.items() if key in points[0]]
    for index, (name, frame) in enumerate(elsewhere.items()):
        costs.append(_time_by_ratio(f"elsewhere_{index}", name, frame, points, others))
    qualities = [_axis(key, *what) for key, what in QUALITIES.items() if key in points[0]]
    return {
        "name": "this machine",
        "dial": "threshold",
        "points": points,
        "references": others,
        "costs": costs,
        "qualities": qualities,
        "note": "",
    }


def published_line(name: str, frame: pd.DataFrame, times: Times) -> Line:
    """The line of a frame of `modlab.published.real_models`.

    Args:
        times: frames of `modlab.published.kv_latencies` by name, put at the KV saving of each point.
    """
    points = [
        {"at": float(row["kv_saving"]), "kv_share": 1 / row["kv_saving"]} for _, row in frame.iterrows()
    ]
    dense: dict[str, Any] = {"name": "dense", "kv_share": 1.0}
    qualities = []
    for key in (column for column in frame.columns if column not in ("kv_saving", "agreement")):
        qualities.append(_quality(str(key)))
        dense[str(key)] = 0.0
        for point, value in zip(points, frame[key], strict=True):
            point[str(key)] = float(value)
    costs = [_axis("kv_share", "KV cache, share of a dense one", "share")]
    for index, (what, measured) in enumerate(times.items()):
        costs.append(_time_by_saving(f"time_{index}", what, measured, points, dense))
    return {
        "name": name,
        "dial": "saving",
        "points": points,
        "references": [dense],
        "costs": costs,
        "qualities": qualities,
        "note": frame.attrs.get("origin", ""),
    }


def _points(sweep: pd.DataFrame) -> list[dict[str, float]]:
    """Rows of a sweep by ascending p."""
    need = ["threshold", "loss", "keep_ratio", "kv_bytes"]
    missing = [name for name in need if name not in sweep.columns]
    if missing:
        raise ModlabError(
            f"The sweep has no column {', '.join(missing)}; it has {', '.join(map(str, sweep.columns))}. "
            "Pass the frame that modlab.sweep(model, tokenizer, texts, thresholds=...) returns."
        )
    more = [
        name
        for name in ("prefill_ms", "decode_ms", "recall_loss")
        if name in sweep and sweep[name].notna().all()
    ]
    frame = sweep.sort_values("threshold")[[*need, *more]].dropna().astype(float)
    if len(frame) < 2:
        raise ModlabError(f"A frontier needs two thresholds or more; the sweep has {len(frame)}.")
    rows = frame.rename(columns={"threshold": "at"})
    return [{str(k): float(v) for k, v in row.items()} for row in rows.to_dict("records")]


def _axis(key: str, title: str, unit: str, note: str = "") -> Axis:
    return {"key": key, "title": title, "unit": unit, "note": note}


def _quality(key: str) -> Axis:
    """The axis of a column of `published.real_models`."""
    kind, _, distance = key.rpartition("_")
    if kind == "recall_gap":
        return _axis(key, f"loss on a passage {int(distance):,} tokens back, nats above dense", "nats")
    if kind == "lost":
        return _axis(key, f"answers lost, {int(distance):,} tokens back (of those that dense has)", "share")
    if kind == "task_gap":
        return _axis(key, f"RULER-kind tasks of {int(distance):,} tokens, mean score below dense", "share")
    return _axis(key, "KL to the dense model, nats a token, after 1,024 tokens", "nats")


def _time_by_ratio(
    key: str, name: str, frame: pd.DataFrame, points: list[dict[str, float]], references: list[dict[str, Any]]
) -> Axis:
    """Puts the times of another machine into points and dense references; returns the axis."""
    _check(name, frame, "keep_ratio", "latencies")
    frame = frame.sort_values("keep_ratio")
    for point in points:
        # Outside of what was measured: the time at the nearest keep ratio that was.
        point[key] = float(np.interp(point["keep_ratio"], frame["keep_ratio"], frame["mod_ms"]))
    for reference in references:
        if reference["name"].startswith("dense"):
            reference[key] = float(frame["dense_ms"].iloc[0])
    origin = frame.attrs.get("origin", "") or name
    return _axis(key, name, "ms", f"Time: {origin}, at the keep ratio that this model has at p.")


def _time_by_saving(
    key: str, name: str, frame: pd.DataFrame, points: list[dict[str, float]], dense: dict[str, Any]
) -> Axis:
    """The same at the share of bytes that each point has; where no time was measured near a whole cache, the
    dense model's stands for it."""
    _check(name, frame, "kv_saving", "kv_latencies")
    share, ms = list(1 / frame["kv_saving"]), list(frame["mod_ms"])
    dense[key] = float(frame["dense_ms"].iloc[0])
    if max(share) < 0.9:
        share, ms = [*share, 1.0], [*ms, dense[key]]
    order = np.argsort(share)
    for point in points:
        point[key] = float(np.interp(point["kv_share"], np.asarray(share)[order], np.asarray(ms)[order]))
    savings = ", ".join(f"{saving:.1f}x" for saving in frame["kv_saving"])
    note = (
        f"Time: {frame.attrs.get('origin', '') or name}; measured at {savings}, straight between that and "
        "dense, beyond it as at the last one measured."
    )
    return _axis(key, name, "ms", note)


def _check(name: str, frame: pd.DataFrame, by: str, made_by: str) -> None:
    missing = [column for column in (by, "dense_ms", "mod_ms") if column not in frame.columns]
    if missing:
        raise ModlabError(
            f"the times of {name!r} have no column {', '.join(missing)}; give a frame of "
            f"modlab.published.{made_by}."
        )
