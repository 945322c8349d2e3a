"""The depth section of docs/quality.md: from committed results alone, of each arm the newest."""

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


def test_each_arm_has_a_row_of_the_newest_result_that_has_it(tmp_path: Path) -> None:
    new = result("2026-12-02", "leave-2/3", "static-layer-0.9", "topk")
    new["rows"][0] |= {"prefill_speedup": 1.46, "retrieval_of_dense": {"256": 0.90385, "1024": 0.8}}
    new["rows"][0]["tasks"] = {"piqa": {}, "mean": {"score": 0.49, "dense": 0.5, "gap_stderr": 0.004}}
    new["rows"][0]["ratio"], new["prefill"] = 4.03, [{"context": 32768}]
    old = result("2026-12-01", "topk", "mlp-0.9")
    text = depth.block(committed(tmp_path, new, old))
    assert text.count("`the command`") == 2, "one of each result with a row"
    tasks = "0.4900 of 0.5000 (98.0%) ± 0.0040: piqa"
    quality = "0.200 | +0.010 -0.020 | 0.90 0.80"
    assert f"| leave-2/3 | 3M | 0.70 / 0.600 | 4.03x | {quality} | {tasks} | 1.46x |" in text
    assert "| topk | 3M | 0.70 / 0.800 | - | 0.100 | +0.010 -0.020 | - | - | - |" in text
    assert "at distances of 256, 1,024 tokens" in text and "a prompt of 32,768 tokens" in text
    assert "| mlp-0.9 | 3M | 0.70 / 0.700 |" in text and text.count("| topk |") == 1
    assert "](depth_toy_1024.png)" in text


def test_results_of_other_lengths_are_tables_of_their_own(tmp_path: Path) -> None:
    longer = result("2026-12-02", "topk")
    longer["rows"][0]["length"] = 8192
    text = depth.block(committed(tmp_path, result("2026-12-01", "topk"), longer))
    assert text.count("### toy on cpu") == 2 and text.count("| topk |") == 2


def test_bars_are_of_texts_and_of_paired_differences() -> None:
    one = result("2026-12-02", "leave-2/3")
    one["rows"][0] |= {
        "prefill_speedup": 1.25,
        "tasks": {"mean": {"score": 0.49, "dense": 0.5, "gap_stderr": 0.004}},
    }
    points = [(p.x[0], p.y[0], p.error_y.array[0], p.error_y.arrayminus[0]) for p in depth.figure(one).data]
    kl, tasks = (
        (0.2, pytest.approx(0.05), pytest.approx(0.15)),
        (0.98, pytest.approx(0.008), pytest.approx(0.008)),
    )
    assert len(depth.figure(result("2026-12-02", "leave-2/3")).data) == 1, "nothing was timed or asked"
    assert points == [(0.6, *kl), (0.6, *tasks), (0.8, *kl), (0.8, *tasks)]


def test_an_arm_without_tasks_is_no_point_there_and_axes_fit_what_is_shown() -> None:
    one = result("2026-12-02", "leave-2/3", "static-layer-0.9")
    one["rows"][0]["tasks"] = {"mean": {"score": 0.49, "dense": 0.5, "gap_stderr": 0.005}}
    drawing = depth.figure(one)
    assert [(p.name, p.yaxis) for p in drawing.data] == [("leave", "y"), ("leave", "y2"), ("static", "y")]
    kl, tasks = drawing.layout.yaxis.range, drawing.layout.yaxis2.range
    assert kl == (0, pytest.approx(0.25 + 0.02)) and tasks == (pytest.approx(0.968), pytest.approx(0.992))


def test_what_a_record_notes_stands_with_its_command(tmp_path: Path) -> None:
    text = depth.block(committed(tmp_path, result("2026-12-02", "topk") | {"note": "On a busy card."}))
    assert "Made by `the command`. On a busy card." in text


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_a_colour(arm: str) -> None:
    drawn = depth.figure(result("2026-12-02", arm))
    (trained,) = drawn.data[0].marker.symbol
    assert trained == depth.FAMILIES[depth.family(arm)][1]
    untrained = result("2026-12-02", arm)
    untrained["rows"][0]["tokens"] = 0
    assert depth.figure(untrained).data[0].marker.symbol == (f"{trained}-open",)
