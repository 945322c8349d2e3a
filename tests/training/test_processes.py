"""Several processes do what one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

WORKER = Path(__file__).with_name("train_in_processes.py")


def reports(out: Path, processes: int, batch_size: int) -> list[dict[str, Any]]:
    """What the worker says in so many processes, one report a rank."""
    out.mkdir()
    launch(WORKER, processes, out, batch_size)
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    (alone,) = reports(tmp_path / "one", 1, 4)
    pair = reports(tmp_path / "two", 2, 2)
    assert len(pair) == 2
    for moment in ("weights", "calibrated"):
        assert pair[0][moment] == pair[1][moment], "both processes hold the same model"
    assert len(alone["calibrated_on"]) == 1
    assert pair[0]["calibrated_on"] == pair[1]["calibrated_on"] == alone["calibrated_on"]
    assert alone["keep_ratio"] == pytest.approx(0.5, abs=0.01)
    assert pair[0]["keep_ratio"] == pytest.approx(0.5, abs=0.01)
    for name, total in alone["weights"].items():
        assert pair[0]["weights"][name] == pytest.approx(total, rel=1e-4, abs=1e-4), name
    for part, columns in (
        ("dense", ("loss", "grad_norm", "tokens")),
        ("mod", ("loss", "keep_ratio", "objective")),
    ):
        for column in columns:
            assert pair[0][part][column] == pytest.approx(alone[part][column], rel=1e-3, abs=1e-5), (
                part,
                column,
            )
    assert pair[0]["dense"]["eval_loss"][-1] == pytest.approx(alone["dense"]["eval_loss"][-1], rel=1e-4)
    assert pair[0]["tokens"] == alone["tokens"]
    lines = (tmp_path / "two" / "mod" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
