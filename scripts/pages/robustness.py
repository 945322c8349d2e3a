"""What was killed, damaged and decoded at length, from what `python -m benchmarks.robustness` wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("benchmarks", "results", "robustness")


def latest(root: Path, part: str) -> dict[str, Any] | None:
    """The newest result that has this part, by its date."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((root / FOLDER).glob("*.json"))]
    having = [result for result in found if part in result]
    return max(having, key=lambda result: str(result["date"]), default=None)


def block(root: Path) -> str:
    """A table for each part, with how it was made."""
    lines: list[str] = []
    for part, (heads, cells) in TABLES.items():
        if (result := latest(root, part)) is None:
            continue
        lines += [_made(result), "", *_table(heads, [cells(row) for row in result[part]]), ""]
    return "\n".join(lines).rstrip()


def _made(result: dict[str, Any]) -> str:
    note = f" ({result['note']})" if result.get("note") else ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    return (
        f"`{result['command']}` on {result['device_name']}, {versions}, {result['date']}, "
        f"commit {str(result['commit'])[:7]}{note}:"
    )


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
    ]


def _killed(row: dict[str, Any]) -> tuple[Any, ...]:
    bad = (len(row[name]) for name in ("mixed", "refused", "lost", "leftovers"))
    return row["kind"], row["kills"], row["first"], row["second"], *bad


def _fuzzed(row: dict[str, Any]) -> tuple[Any, ...]:
    counts = (f"{row[name]:,}" for name in ("inputs", "refused", "read"))
    return row["parser"], *counts, len(row["wrong"]), len(row["crashed"]), f"{row['slowest_ms']:,.0f} ms"


def _decoded(row: dict[str, Any]) -> tuple[Any, ...]:
    most = max(sample[2] for sample in row["samples"])
    return row["case"], f"{row['tokens']:,}", most, row["bound"], row["grew"] or "nothing"


FUZZED = (
    "damaged file",
    "inputs",
    "refused",
    "read",
    "read with a wrong value",
    "other exceptions",
    "slowest",
)
TABLES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    "kills": (
        (
            *("folder, saved over an older one", "savers killed", "then the old one whole"),
            *("the new one whole", "a mixture", "unreadable"),
            *("files of the user lost", "left over after the next save"),
        ),
        _killed,
    ),
    "files": (FUZZED, _fuzzed),
    "folders": (FUZZED, _fuzzed),
    "decoding": (
        ("long decoding", "tokens", "most tokens that a layer stored", "bound", "what grew"),
        _decoded,
    ),
}
