"""The pieces of a run as rows of one result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_models.measured.pieces import Folder
from benchmarks.real_models.measured.run import FIT, KV_CACHE_DTYPE, ORIGIN
from benchmarks.real_models.measured.settings import DENSE, Setting, at, named
from benchmarks.real_models.run import rounded
from modlab.published import MEASURED

NOTE = (
    "By the product's own cache. Thresholds were set on other rows of the same three texts; rows of controls "
    "ran whole, with the gates' stored keys."
)


def joined(path: Path) -> dict[str, Any]:
    """The file's content: where it comes from, a row a setting, and one a control; what was not measured is
    missing from a row, and a setting of which nothing is known but its threshold has none. A saving's first
    setting, that with its own recent tokens if it is there, has the name of the arm; those after it say how
    many tokens are recent, too. Next to routers that `quick` has fitted stands how long that took."""
    folder = Folder(path)
    origin = folder.read(ORIGIN)
    about = {name: origin[name] for name in ("model", "arm", "granularity", "tokens", "seed")}
    about[KV_CACHE_DTYPE] = origin.get(KV_CACHE_DTYPE, "auto")
    rows: list[dict[str, Any]] = []
    for setting in _settings(folder):
        again = any(row["ratio_asked"] == setting.saving for row in rows)
        arm = f"{about['arm']}, {setting.recent:,} recent tokens" if again else about["arm"]
        rows.append(_row(folder, setting, {**about, "arm": arm}))
        own = {**about, "tokens": 0, "ratio_asked": setting.saving, "tasks": {}}
        rows += [
            {**own, "arm": f"{arm}: {found['control']}"} | _measures(found)
            for found in _controls(folder, setting)
        ]
    fit = {FIT: folder.read(FIT)["rows"][0]} if folder.done(FIT) else {}
    seconds = {file.stem: folder.read(file.stem).get("seconds") for file in sorted(path.glob("*@*.json"))}
    failed = sorted(file.name.split(".failed")[0] for file in path.glob("*.failed.json"))
    return rounded(
        {"what": MEASURED, **origin, "note": NOTE, "rows": rows, **fit, "failed": failed,
         "seconds": {name: value for name, value in seconds.items() if value is not None}}
    )  # fmt: skip


def _row(folder: Folder, setting: Setting, about: dict[str, Any]) -> dict[str, Any]:
    row = {**about, "ratio_asked": setting.saving, "tasks": _tasks(folder, setting)}
    if folder.done(at("threshold", setting)):
        found = folder.read(at("threshold", setting))
        row |= {name: found[name] for name in ("threshold", "recent", "ratio_set", "beyond_training")}
    return row | (_measures(folder.read(at("far", setting))) if folder.done(at("far", setting)) else {})


def _measures(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in found.items() if name not in ("seconds", "control", "keep_by_gate")
    }


def _settings(folder: Folder) -> list[Setting]:
    files = [file for file in folder.path.glob("*@*.json") if not file.name.startswith("threshold@")]
    found = {named(file.stem) for file in files}
    return sorted((setting for setting in found if setting is not None), key=lambda one: one.order)


def _controls(folder: Folder, setting: Setting) -> list[dict[str, Any]]:
    files = sorted(folder.path.glob(at("control *", setting) + ".json"))
    return sorted((folder.read(file.stem) for file in files), key=lambda found: found["kl_far"])


def _tasks(folder: Folder, setting: Setting) -> dict[str, Any]:
    """Each task at a setting next to the dense model, paired, and by which path it ran if there are two."""
    tasks: dict[str, Any] = {}
    for file in sorted(folder.path.glob(at("*", setting) + ".json")):
        kind = file.stem.rsplit("@", 1)[0]
        found = folder.read(file.stem)
        if "scores" not in found or not folder.done(at(kind, DENSE)):
            continue
        dense = folder.read(at(kind, DENSE))["scores"]
        told = {"kind": kind.split("_")[0]} | {name: found[name] for name in ("path",) if name in found}
        tasks |= {name: {**told, **paired(own, dense[name])} for name, own in found["scores"].items()}
    return tasks


def paired(own: list[float], dense: list[float]) -> dict[str, Any]:
    """Means of both, and the standard error of their difference over items."""
    gap = np.array(own) - np.array(dense)
    error = float(gap.std(ddof=1) / len(gap) ** 0.5) if len(gap) > 1 else None
    return {
        "score": float(np.mean(own)), "dense": float(np.mean(dense)), "items": len(own),
        "difference": float(gap.mean()), "stderr": error,
    }  # fmt: skip
