"""The runs' JSON as one result file, and docs/quality.md with its pictures from that file alone.

python -m benchmarks.quality report          # rows: benchmarks/results/quality_<date>.json
python -m scripts.pages --pictures           # docs/quality.md, docs/quality_*.png
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modlab.bench.registry import SCHEMA_VERSION

Row = dict[str, Any]
RECALL_AT = 2048  # tokens between the copies, for the one figure of a row


def read_runs(folder: Path) -> list[Row]:
    """Every run's record, in the order of their names. Runs of one base lie in one folder, here or below."""
    return [
        json.loads(path.read_text()) | {"base": path.parent.relative_to(folder).as_posix()}
        for path in sorted(folder.rglob("*.json"))
    ]


def rows_of(runs: Iterable[Row]) -> list[Row]:
    """One row an operating point. What is compared with is the dense continuation of the same base on the
    same tokens: of the same seed where there is one, else the mean over its seeds."""
    runs = list(runs)
    bases = dict.fromkeys(run["base"] for run in runs)
    return [row for base in bases for row in _rows([run for run in runs if run["base"] == base])]


def _rows(runs: list[Row]) -> list[Row]:
    zero: dict[tuple[int, int | None], Row] = {}
    for tokens in sorted({run["tokens"] for run in runs}):
        dense = [run for run in runs if run["arm"] == "dense" and run["tokens"] == tokens]
        if dense:
            zero[tokens, None] = _zero(dense)
        for run in dense:
            own = _zero([run])
            zero[tokens, run["seed"]] = own | {"recall": own["recall"] or zero[tokens, None]["recall"]}
    rows = []
    for run in runs:
        base = zero.get((run["tokens"], run["seed"])) or zero.get((run["tokens"], None))
        for point in run["points"]:
            if "loss" in point and base is not None:
                rows.append(_row(run, point, base))
    return rows


def _zero(runs: list[Row]) -> Row:
    points = [run["points"][0] for run in runs]
    return {
        "loss": statistics.fmean(p["loss"] for p in points),
        "recall": _mean_by(points, "recall", "second_loss"),
    }


def _mean_by(points: list[Row], kind: str, value: str) -> dict[int, float]:
    """`value` by distance, mean over the points that have the measure."""
    found: dict[int, list[float]] = {}
    for point in points:
        for line in point.get(kind, []):
            found.setdefault(int(line["distance"]), []).append(line[value])
    return {distance: statistics.fmean(values) for distance, values in found.items()}


def _row(run: Row, point: Row, zero: Row) -> Row:
    recall = _mean_by([point], "recall", "second_loss")
    gaps = {d: loss - zero["recall"][d] for d, loss in recall.items() if d in zero["recall"]}
    at = RECALL_AT if RECALL_AT in gaps else max(gaps, default=None)
    row = {
        "arm": run["arm"],
        "seed": run["seed"],
        "base": run["base"],
        "tokens": run["tokens"],
        "point": point["point"],
        "keep_ratio": round(point["keep_ratio"], 4),
        "asked_keep_ratio": point.get("asked")
        or (run["asked_keep_ratio"] if point["point"] == "trained" else None),
        "kv_saving": round(point["kv_saving"], 4),
        "flops_share": round(point["flops_share"], 4),
        "loss": round(point["loss"], 5),
        "dense_loss": round(zero["loss"], 5),
        "gap": round(point["loss"] - zero["loss"], 5),
        "recall_gap": None if at is None else round(gaps[at], 4),
        "recall_gap_by_distance": {d: round(gap, 4) for d, gap in gaps.items()},
        "keep_by_layer": {i: round(share, 4) for i, share in point["keep_by_layer"].items()},
        "device_name": run["device_name"],
        "date": run["date"][:10],
    }
    if run.get("base_loss") is not None:  # frozen: routing alone is what was added to it
        row["gap_to_base"] = round(point["loss"] - run["base_loss"], 5)
    if "retrieval" in point:
        row["retrieval"] = _mean_by([point], "retrieval", "accuracy")
    if "generation" in point:
        row["generation"] = {
            kind: {k: point["generation"][kind][k] for k in ("repeated_ngrams", "in_loops", "judge_loss")}
            | {"keep_ratio": _mean(point["generation"][kind]["keep_ratio_by_layer"])}
            for kind in ("greedy", "sampled", "heldout")
        }
    return row


def _mean(by_layer: dict[str, float]) -> float:
    return statistics.fmean(by_layer.values()) if by_layer else 1.0


def write_result(runs: list[Row], folder: Path) -> Path:
    """Writes all rows to `folder`/quality_<date of the latest run>.json and returns its path."""
    content = result(runs)
    path = folder / f"quality_{content['date'][:10]}.json"
    rows = ",\n  ".join(json.dumps(row) for row in content.pop("rows"))
    head = json.dumps(content, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
    return path


def result(runs: list[Row]) -> Row:
    """The content of quality_<date>.json."""
    latest = max(runs, key=lambda run: run["date"])
    kept = ("commit", "device", "device_name", "dtype", "versions", "date")
    return {
        "schema": SCHEMA_VERSION,
        "what": "quality",
        "command": " && ".join(sorted({run["command"] for run in runs})),
        "devices": sorted({run["device_name"] for run in runs}),
        **{name: latest[name] for name in kept},
        "commits": sorted({str(run["commit"]) for run in runs}),
        "rows": rows_of(runs),
    }
