"""docs/quality.md on `recipe("quick")`: what routers lose that are only fitted, and how long a fit takes.

From benchmarks/results/quick_*.json (`modlab report`, or `real_models join`) and, where nothing but the fit
was measured, quick/*.json (`real_models quick`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modlab.published import MEASURED
from scripts.pages import measured, real_models

SAVING = 2.0
MOST = 0.01
"""Largest KL and recall gap that routers of the recipe are to have at `SAVING`."""
SECONDS = {"coder-1.5b": 10, "llama-3-8b": 60}
"""What a fit may take on one GPU, where that was asked for."""


def block(root: Path) -> str:
    """The GPU's fits in one table, what their routers lose in another; then each report on a CPU."""
    folder = root / "benchmarks" / "results"
    whole, alone = _read(folder, "quick_*.json"), _read(folder / "quick", "*.json")
    joined = [record for record in whole if record["what"] == MEASURED]
    fits = [(record, record["fit"]) for record in joined] + [(one, one["rows"][0]) for one in alone]
    parts = [real_models.reports([record for record in whole if record not in joined])]
    if joined:
        parts.insert(0, _losses(joined))
    if fits:
        parts.insert(0, _times(sorted(fits, key=lambda found: found[1]["parameters"])))
    return "\n\n".join(parts)


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(pattern))]


def _times(fits: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    record = fits[0][0]
    lines = [
        f"Seconds of a fit, {record['device_name']}, {record['dtype']}, torch {record['versions']['torch']}; "
        "loading and tokenising are not in them, other processes used the host. The first compiles kernels. "
        "The 8B shape has random weights and reads random tokens, so its R² says nothing.",
        "",
        "| model | parameters | tokens | first fit | second fit | asked | R² (linear part alone) | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, row in fits:
        first, second = row["seconds"]
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e9:.2f} B | {row['tokens']:,} | {first:.1f} s | "
            f"{second:.1f} s | {_asked(row['model'], second)} | {row['r2']:.3f} ({row['r2_linear']:.3f}) | "
            f"{row['peak_mib'] / 1024:.1f} GiB |"
        )
    return "\n".join(lines)


def _asked(model: str, seconds: float) -> str:
    if model not in SECONDS:
        return "-"
    return f"{SECONDS[model]} s: {measured.MET if seconds <= SECONDS[model] else measured.MISSED}"


def _losses(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        commit = str(record["commit"])[:7]
        lines.append(f"- {record['model']}: commit {commit}, `{record['command']}`. {record['note']}")
    lines += [
        "",
        "| model | asked | recent | K/V together (by text) | KL | recall gap at 256, 1,024, 4,000, 7,000 | "
        f"worst retrieval | at most {MOST:g} of both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for record in records for row in record["rows"] if row["ratio_asked"] > 1]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    texts, gaps = row["ratio_by_text"].values(), row["recall_gap"]
    far = max(gaps, key=lambda distance: gaps[distance])
    held = measured.MET if max(row["kl_far"], gaps[far]) <= MOST else measured.MISSED
    told = " ".join(f"{gap:.3f}" for gap in gaps.values())
    return (
        f"| {row['model']} | {row['ratio_asked']:g}x | {row['recent']:,} | {row['ratio']:.2f}x "
        f"({min(texts):.1f}x to {max(texts):.1f}x) | {row['kl_far']:.4f} | "
        f"{told} (worst ± {row['recall_gap_stderr'][far]:.3f}) | "
        f"{min(row['retrieval_of_dense'].values()):.3f} | {held if row['ratio_asked'] == SAVING else '-'} |"
    )
