"""What runs have left, as one result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result(folders: list[Path], origin: dict[str, Any]) -> dict[str, Any]:
    """The file's content: where it comes from, how each run's gates were made, and all rows.

    Args:
        folders: of runs, each with rows.jsonl and facts of its arms.
        origin: date, device_name, dtype, commit, command, versions.
    """
    rows, made = [], []
    for folder in folders:
        for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            rows.append({"run": folder.name, **json.loads(line)})
        for path in sorted(folder.glob("facts_*.json")):
            made.append({"run": folder.name, **json.loads(path.read_text(encoding="utf-8"))})
    return {"what": "real_gates", **origin, "gates": made, "rows": rows}
