"""What runs have left, as one result file: benchmarks/results/depth_<model>_<date>.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError

ORIGIN = ("date", "device_name", "dtype", "commit", "command", "versions")

NOTE = (
    "Each arm is distilled against its dense self for as many tokens as its row says; its plan may name "
    "more, where --minutes ended it."
)
"""What a reader of any such file has to know; an origin may say more."""


def result(folders: list[Path], origin: dict[str, Any]) -> dict[str, Any]:
    """The file's content: where it comes from, and all rows.

    Args:
        folders: of runs, each with rows.jsonl, prefill.jsonl or both.
        origin: what `ORIGIN` names, and maybe a note.

    Raises:
        ModlabError: something of the origin is missing, or there is nothing to report.
    """
    if missing := [name for name in ORIGIN if not origin.get(name)]:
        raise ModlabError(f"a result says where it comes from: give {', '.join(missing)} too.")
    rows = [row for folder in folders for row in _lines(folder / "rows.jsonl")]
    times = [row for folder in folders for row in _lines(folder / "prefill.jsonl")]
    if not rows and not times:
        raise ModlabError(f"no rows.jsonl and no prefill.jsonl in {', '.join(map(str, folders))}.")
    drawn_first = sorted(times, key=lambda row: row.get("routing") == "trained")  # the last one counts
    speedup = {_what(row["model"], row): row["speedup"] for row in drawn_first}
    for row in rows:
        row["prefill_speedup"] = speedup.get(_what(row["model"], row.get("arm_fields", {}).get("mod", {})))
    return {"what": "depth", "note": NOTE, **origin, "rows": rows, "prefill": times}


def _what(model: str, mod: dict[str, Any]) -> tuple[str, str, float | None]:
    """What makes a timed prompt one of an arm; rows of arms are rounded."""
    after = mod.get("leave_after")
    return model, mod.get("skip", "prompt"), None if after is None else round(after, 4)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
