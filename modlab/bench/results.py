"""Result files: written whole or not at all, with all that is needed to repeat the run; tables and plots."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from modlab import __version__
from modlab.bench.registry import SCHEMA_VERSION, Row, Settings
from modlab.errors import ModlabError


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def source_commit() -> str | None:
    """The commit of the source tree this runs from, "-dirty" added if files differ; None if it is not one."""
    root = Path(__file__).resolve().parent.parent.parent
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if status else "")


def _without(flags: Sequence[str], argv: Sequence[str]) -> list[str]:
    """The arguments less these flags and their values: where a file went is not needed to repeat the run."""
    return [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if before not in flags and word.split("=", 1)[0] not in flags
    ]


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What every published figure carries: date, device, dtype and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "modlab": __version__,
        },
    }


def report(name: str, settings: Settings, argv: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """A result file's content without its rows yet: everything needed to judge and to repeat them.

    Args:
        commit: of the source tree, where git cannot be asked or would be wrong (a copy without its history).
    """
    cpu = settings.device.type == "cpu"
    return {
        "schema": SCHEMA_VERSION,
        "what": name,
        "command": shlex.join(["modlab", "bench", *_without(("--out", "--commit"), argv)]),
        "commit": commit or source_commit(),
        **circumstances(settings.device, settings.dtype),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # 1-minute load averages before and after: above the threads used here, something else was running
        "load": {"before": load_average(), "after": None} if cpu else None,
        "settings": {
            field.name: str(value) if isinstance(value, (torch.device, torch.dtype)) else value
            for field in dataclasses.fields(settings)
            for value in [getattr(settings, field.name)]
        },
        "rows": [],
    }


def finish(result: dict[str, Any]) -> None:
    """Notes what is known at the end only."""
    if result["load"] is not None:
        result["load"]["after"] = load_average()


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@contextlib.contextmanager
def own_file(result: dict[str, Any], folder: Path) -> Iterator[Path]:
    """A file `<what>_<device>_<date>.json` with the result as it is now; a second run of a day gets a number,
    also while the first is still at work. If there are no rows at the end, it goes again."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if result["device"] == "cpu" else "-".join(result["device_name"].lower().split())
    stem = f"{result['what']}_{device}_{result['date'][:10]}"
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    path = _made(folder / f"{stem}{number}.json" for number in numbers)
    try:
        write(result, path)
        yield path
    finally:
        if not result["rows"]:
            path.unlink()


def _made(paths: Iterable[Path]) -> Path:
    """The first one that is not there yet, empty."""
    for path in paths:
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("there is no last number")


def write(result: dict[str, Any], path: Path) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


PLOTTED = {"case": str, "shape": str, "context": int, "batch": int, "routed": str}  # names a curve
FIGURES = ("keep_ratio", "speedup", "ideal")


def read(path: Path) -> dict[str, Any]:
    """A result file as `write` left it, with all that `plot` reads.

    Raises:
        ModlabError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModlabError(f"{path}: not a readable result file ({type(error).__name__}: {error}).") from error
    if not isinstance(result, dict) or not isinstance(rows := result.get("rows"), list):
        raise ModlabError(f"{path}: not a result of `modlab bench`, which is an object with rows.")
    wrong = [name for name in ("what", "device_name", "dtype", "date") if type(result.get(name)) is not str]
    for row in rows:
        row = row if isinstance(row, dict) else {}
        wrong += [name for name, kind in PLOTTED.items() if type(row.get(name)) is not kind]
        wrong += [name for name in FIGURES if type(row.get(name)) not in (int, float)]
    if wrong:
        raise ModlabError(
            f"{path}: not a result of `modlab bench`: {wrong[0]} is missing or of another type."
        )
    return result


COLUMNS = {
    "case": ("case", 10),
    "context": ("context", 8),
    "batch": ("batch", 6),
    "routed": ("routed", 10),
    "keep_ratio": ("keep", 5),
    "dense_ms": ("dense ms", 10),
    "mod_ms": ("MoD ms", 10),
    "speedup": ("speed-up", 9),
    "ideal": ("ideal", 6),
    "kv_saving": ("KV saving", 10),
}


def table(rows: Sequence[Row], header: bool = True) -> str:
    """The rows as aligned text."""
    lines = ["".join(title.rjust(width) for title, width in COLUMNS.values())] if header else []
    for row in rows:
        cells = [(row[key], width) for key, (_, width) in COLUMNS.items()]
        lines.append("".join((f"{v:.2f}" if isinstance(v, float) else str(v)).rjust(w) for v, w in cells))
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> Any:
    """Speed-up against keep ratio with the ideal, one colour a measured case, as a plotly figure."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ModlabError("bench --plot needs plotly: pip install plotly") from error
    groups: dict[str, list[Row]] = {}
    for row in result["rows"]:
        label = "{case}, {shape}, {context} tokens, batch {batch}, {routed} routed".format_map(row)
        groups.setdefault(label, []).append(row)
    colours = ("#3366cc", "#dc3912", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e")
    figure = go.Figure()
    for number, (label, rows) in enumerate(groups.items()):
        rows = sorted(rows, key=lambda row: row["keep_ratio"])
        line = {"color": colours[number % len(colours)]}
        for name, key, dash in ((label, "speedup", "solid"), (f"{label}: ideal", "ideal", "dot")):
            figure.add_scatter(
                x=[row["keep_ratio"] for row in rows],
                y=[row[key] for row in rows],
                name=name,
                mode="lines+markers" if key == "speedup" else "lines",
                line=line | {"dash": dash},
            )
    figure.add_hline(y=1.0, line_width=1, line_color="grey")
    figure.update_layout(
        title=f"{result['what']} on {result['device_name']}, {result['dtype']}, {result['date'][:10]}",
        xaxis_title="keep ratio of routed layers",
        yaxis_title="speed-up over dense",
        legend={"orientation": "h", "y": -0.2},
    )
    return figure
