"""The pieces of a run as rows of one result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_models.measured.pieces import Folder
from benchmarks.real_models.measured.run import ORIGIN
from benchmarks.real_models.measured.work import DENSE, at
from benchmarks.real_models.run import rounded
from modlab.published import MEASURED

NOTE = (
    "By the product's own cache. Thresholds were set on other rows of the same three texts; rows of controls "
    "ran whole, with the gates' stored keys."
)


def joined(path: Path) -> dict[str, Any]:
    """The file's content: where it comes from, a row a saving, and one a control; what was not measured is
    missing from a row."""
    folder = Folder(path)
    origin = folder.read(ORIGIN)
    about = {name: origin[name] for name in ("model", "arm", "granularity", "tokens", "seed")}
    rows = []
    for saving in _savings(folder):
        row = {**about, "ratio_asked": saving, "tasks": _tasks(folder, saving)}
        if folder.done(at("threshold", saving)):
            found = folder.read(at("threshold", saving))
            row |= {name: found[name] for name in ("threshold", "recent", "ratio_set", "beyond_training")}
        if folder.done(at("far", saving)):
            row |= _measures(folder.read(at("far", saving)))
        rows.append(row)
        rows += [
            {
                **about,
                "tokens": 0,
                "arm": f"{about['arm']}: {found['control']}",
                "ratio_asked": saving,
                "tasks": {},
            }
            | _measures(found)
            for found in _controls(folder, saving)
        ]
    seconds = {file.stem: folder.read(file.stem).get("seconds") for file in sorted(path.glob("*@*.json"))}
    failed = sorted(file.name.split(".failed")[0] for file in path.glob("*.failed.json"))
    return rounded(
        {"what": MEASURED, **origin, "note": NOTE, "rows": rows, "failed": failed,
         "seconds": {name: value for name, value in seconds.items() if value is not None}}
    )  # fmt: skip


def _measures(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in found.items() if name not in ("seconds", "control", "keep_by_gate")
    }


def _savings(folder: Folder) -> list[float]:
    found = {file.stem.rsplit("@", 1)[1] for file in folder.path.glob("*@*.json")}
    return sorted(float(saving) for saving in found if saving.replace(".", "").isdigit())


def _controls(folder: Folder, saving: float) -> list[dict[str, Any]]:
    files = sorted(folder.path.glob(at("control *", saving) + ".json"))
    return sorted((folder.read(file.stem) for file in files), key=lambda found: found["kl_far"])


def _tasks(folder: Folder, saving: float) -> dict[str, Any]:
    """Each task at a saving next to the dense model, paired."""
    tasks: dict[str, Any] = {}
    for file in sorted(folder.path.glob(at("*", saving) + ".json")):
        kind = file.stem.rsplit("@", 1)[0]
        scores = folder.read(file.stem).get("scores")
        if scores is None or not folder.done(at(kind, DENSE)):
            continue
        dense = folder.read(at(kind, DENSE))["scores"]
        tasks |= {
            name: {"kind": kind.split("_")[0], **paired(own, dense[name])} for name, own in scores.items()
        }
    return tasks


def paired(own: list[float], dense: list[float]) -> dict[str, Any]:
    """Means of both, and the standard error of their difference over items."""
    gap = np.array(own) - np.array(dense)
    error = float(gap.std(ddof=1) / len(gap) ** 0.5) if len(gap) > 1 else None
    return {
        "score": float(np.mean(own)), "dense": float(np.mean(dense)), "items": len(own),
        "difference": float(gap.mean()), "stderr": error,
    }  # fmt: skip
