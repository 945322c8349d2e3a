"""The files of a training run: run.json, log.jsonl, checkpoints/step_N. Each is whole or absent, never
half-written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError
from modlab.training.config import TrainConfig

SAME_ON_RESUME = ("batch_size", "grad_accum", "seed", "processes")  # these decide which rows a step sees


def checkpoints(out: Path | None) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if out is None or not (out / "checkpoints").is_dir():
        return []
    found = [
        (int(m[1]), p) for p in (out / "checkpoints").iterdir() if (m := re.fullmatch(r"step_(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(config: TrainConfig, description: dict[str, Any]) -> Path | None:
    """The checkpoint to start from, or None for a fresh run.

    Raises:
        ModlabError: `out` holds a run that is not to be resumed, or one that saw its data in another order.
    """
    if config.out is None:
        return None
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ModlabError(f"out={str(out)!r} is a file; give a folder.")
    if config.resume is None or str(config.resume) == "auto":
        saved = checkpoints(out)
        if not saved or config.resume is None:
            if any((out / name).exists() for name in ("log.jsonl", "checkpoints", "model")):
                raise ModlabError(
                    f"{out} already holds a run"
                    + (" but no complete checkpoint" if config.resume else "")
                    + ": choose another folder"
                    + (
                        ", or delete it."
                        if config.resume
                        else ", delete it, or set resume='auto' to continue it."
                    )
                )
            return None
        path = saved[-1]
    else:
        path = Path(config.resume)
        if not path.is_dir():
            raise ModlabError(
                f"resume={str(path)!r} is no folder: give a .../checkpoints/step_N folder, or 'auto'."
            )
    record = path.parent.parent / "run.json"
    old = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    differ = [key for key in SAME_ON_RESUME if key in old and old[key] != description[key]]
    if differ:
        changes = ", ".join(f"{key}={description[key]} (was {old[key]})" for key in differ)
        raise ModlabError(
            f"Resuming {path} needs the data order it was trained in, but this differs: {changes}."
        )
    return path


def log_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a log up to `step`; later ones, from after the checkpoint that is resumed, are cut off the
    file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a machine that died while it wrote the last line
            continue
        if row["step"] <= step:
            rows.append(row)
    write_lines(path, rows)
    return rows


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, in the place of the old file."""
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, in the place of the old file."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
