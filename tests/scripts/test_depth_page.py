"""The depth section of docs/quality.md: from committed results alone, the newest of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.depth.arms import ARMS
from scripts.pages import depth


def result(date: str, *arms: str) -> dict[str, Any]:
    rows = [
        {
            "model": "toy", "arm": arm, "tokens": 3_000_000, "compute": 0.6 + 0.1 * place,
            "compute_asked": 0.7, "kl_far": 0.2 - 0.05 * place, "length": 1024, "far_from": 512,
            "kl_far_by_text": {"novels": 0.25, "python": 0.05},
            "recall_gap": {"256": 0.01, "1024": -0.02}, "tasks": {},
        }
        for place, arm in enumerate(arms)
    ]  # fmt: skip
    return {
        "what": "depth", "date": date, "device_name": "cpu", "dtype": "float32", "command": "the command",
        "versions": {"torch": "2.13"}, "rows": rows,
    }  # fmt: skip


def committed(root: Path, *results: dict[str, Any]) -> Path:
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for number, one in enumerate(results):
        (folder / f"depth_toy_{number}.json").write_text(json.dumps(one))
    return root


def test_without_a_result_nothing_is_claimed(tmp_path: Path) -> None:
    assert depth.block(committed(tmp_path)) == depth.NONE


def test_the_newest_result_has_a_row_an_arm(tmp_path: Path) -> None:
    new = result("2026-12-02", "leave-2/3", "static-layer-0.9", "topk")
    new["rows"][0] |= {"prefill_speedup": 1.46, "retrieval_of_dense": {"256": 0.90385, "1024": 0.8}}
    new["rows"][0]["tasks"] = {"piqa": {}, "mean": {"score": 0.49, "dense": 0.5, "gap_stderr": 0.004}}
    new["rows"][0]["ratio"], new["prefill"] = 4.03, [{"context": 32768}]
    text = depth.block(committed(tmp_path, new, result("2026-12-01", "mlp-0.9")))
    tasks = "0.4900 of 0.5000 (98.0%) ± 0.0040: piqa"
    quality = "0.200 | +0.010 -0.020 | 0.90 0.80"
    assert f"| leave-2/3 | 3M | 0.70 / 0.600 | 4.03x | {quality} | {tasks} | 1.46x |" in text
    assert "| topk | 3M | 0.70 / 0.800 | - | 0.100 | +0.010 -0.020 | - | - | - |" in text
    assert "at distances of 256, 1,024 tokens" in text and "a prompt of 32,768 tokens" in text
    assert "mlp-0.9" not in text and "`the command`" in text and "](depth_toy.png)" in text


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_a_colour(arm: str) -> None:
    drawn = depth.figure(result("2026-12-02", arm))
    assert drawn.data[0].marker.symbol == depth.FAMILIES[depth.family(arm)][1]
