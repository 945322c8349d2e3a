"""The section on `recipe("quick")` of docs/quality.md: fits, what their routers lose, a CPU's reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.pages import fitted


def fit(model: str, seconds: list[float]) -> dict[str, Any]:
    return {
        "model": model, "parameters": 2e9 if model == "coder-1.5b" else 8e9, "tokens": 5, "seconds": seconds,
        "r2": 0.7, "r2_linear": 0.6, "peak_mib": 2048.0,
    }  # fmt: skip


def row(saving: float, kl: float, gap: float) -> dict[str, Any]:
    return {
        "model": "coder-1.5b", "ratio_asked": saving, "recent": 1024, "ratio": saving,
        "ratio_by_text": {"x": saving}, "kl_far": kl, "recall_gap": {"256": -0.5, "1024": gap},
        "recall_gap_stderr": {"256": 0.5, "1024": 0.004},
        "retrieval_of_dense": {"256": 1.0, "1024": 0.95},
    }  # fmt: skip


def page(tmp_path: Path, *rows: dict[str, Any]) -> str:
    origin = {
        "device_name": "a GPU", "dtype": "bfloat16", "versions": {"torch": "9"}, "date": "2026-01-01",
        "commit": "c", "command": "go", "note": "Note.",
    }  # fmt: skip
    folder = tmp_path / "benchmarks" / "results"
    (folder / "quick").mkdir(parents=True, exist_ok=True)
    whole = {
        **origin,
        "what": "real_measured",
        "model": "coder-1.5b",
        "rows": list(rows),
        "fit": fit("coder-1.5b", [12, 10.5]),
    }
    (folder / "quick_m.json").write_text(json.dumps(whole))
    alone = {**origin, "what": "fit", "rows": [fit("llama-3-8b", [61, 59])]}
    (folder / "quick" / "m.json").write_text(json.dumps(alone))
    return fitted.block(tmp_path)


def test_seconds_of_the_second_fit_are_held_against_what_was_asked(tmp_path: Path) -> None:
    said = page(tmp_path, row(2.0, 0.01, 0.01))
    assert (
        "| coder-1.5b | 2.00 B | 5 | 12.0 s | 10.5 s | 10 s: **missed** | 0.700 (0.600) | 2.0 GiB |" in said
    )
    assert "| llama-3-8b | 8.00 B | 5 | 61.0 s | 59.0 s | 60 s: met |" in said


def test_a_miss_of_either_figure_at_2x_is_told(tmp_path: Path) -> None:
    for kl, gap, verdict in ((0.01, 0.01, "met"), (0.0101, 0.0, "**missed**"), (0.0, 0.0101, "**missed**")):
        said = page(tmp_path, row(1.0, 0.0, 0.0), row(2.0, kl, gap), row(4.0, 0.001, 0.001)).splitlines()
        (two,) = (line for line in said if line.startswith("| coder-1.5b | 2x |"))
        (four,) = (line for line in said if line.startswith("| coder-1.5b | 4x |"))
        assert two.endswith(f"(worst ± 0.004) | 0.950 | {verdict} |") and four.endswith("| - |")
        assert not any(line.startswith("| coder-1.5b | 1x |") for line in said)
