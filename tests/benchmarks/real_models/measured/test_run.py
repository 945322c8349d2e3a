"""A whole run in tiny, its rows, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_models.__main__ import main
from benchmarks.real_models.measured import fixed
from benchmarks.real_models.measured.run import run
from benchmarks.real_models.measured.work import CONTROLLED
from benchmarks.real_models.texts import Data
from modlab.errors import ModlabError

SIZES = {
    "rows": 2, "held": 1, "lengths": [1000], "samples": 2, "behind": 200, "new": 6, "problems": 2, "items": 4,
    "batch": 2,
}  # fmt: skip
ABOUT = {"arm": "random", "tokens": 0, "seed": 0}


def begun(converted: Path, data: Data, questions: Path, out: Path, **more: Any) -> list[str]:
    data.save(out / "data")
    given = {"savings": [2.0, 4.0], "kinds": (), "sizes": SIZES, **more}
    return run(
        converted, None, out / "data", questions, out / "run", given["savings"], given["kinds"],
        about=ABOUT, device="cpu", fast=False, sizes=given["sizes"], minutes=given.get("minutes"),
    )  # fmt: skip


def test_every_row_of_the_table_is_filled(
    converted: Path, data: Data, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begun(converted, data, questions, tmp_path) == []
    files = {path.name: path.read_text() for path in (tmp_path / "run").glob("*.json")}
    assert begun(converted, data, questions, tmp_path) == []  # nothing is measured again
    assert files == {path.name: path.read_text() for path in (tmp_path / "run").glob("*.json")}
    assert "far@4 done" in capsys.readouterr().out
    out = tmp_path / "real.json"
    main(["join", "--run", str(tmp_path / "run"), "--out", str(out), "--note", "tiny"])
    found = json.loads(out.read_text())
    assert found["failed"] == [] and found["note"] == "tiny" and found["commit"]
    rows = {(row["arm"], row["ratio_asked"]): row for row in found["rows"]}
    assert len(rows) == 3 + len(fixed.NAMES)
    for saving in (2.0, 4.0):
        row = rows["random", saving]
        assert abs(row["ratio"] / saving - 1) < 0.25 and row["granularity"] == "head"
        assert set(row["recall_gap"]) == {"256"} and set(row["retrieval_dense"]) == {"128", "256"}
        kinds = {task["kind"] for task in row["tasks"].values()}
        assert kinds == {"ruler", "humaneval", "shots"} and len(row["tasks"]) == 5 + 1 + 3
        assert all({"score", "dense", "stderr"} <= set(task) for task in row["tasks"].values())
        assert set(row["keep_by_text"]) == {"novels", "wikitext", "headers"}
    assert rows["random", 4.0]["kl_far"] > rows["random", 2.0]["kl_far"] > 0
    floor = rows["random", 1.0]
    assert abs(floor["kl_far"]) < 1e-5 and floor["ratio"] > 0.9 and floor["recall_gap"]["256"] < 1e-3
    for name in fixed.NAMES:
        off = rows[f"random: {name}", 4.0]["ratio"] / rows["random", 4.0]["ratio"] - 1
        assert "whole" in name or abs(off) < 0.07, name  # of four heads there is none for so few keys
    assert {2.0, 4.0} & set(CONTROLLED) == {4.0}


def test_each_saving_has_its_recent_tokens(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    data.save(tmp_path / "data")
    out, given = tmp_path / "run", {"about": ABOUT, "device": "cpu", "fast": False, "sizes": {"held": 1}}
    assert (
        run(
            converted, None, tmp_path / "data", questions, out, [2.0, 3.0], ("far",), recent=[24, 12], **given
        )
        == []
    )
    for saving, recent in ((2, 24), (3, 12)):
        found = json.loads((out / f"threshold@{saving}.json").read_text())
        assert found["recent"] == recent and abs(found["ratio_set"] / saving - 1) < 0.25


def test_what_is_beyond_the_time_is_not_begun(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    assert begun(converted, data, questions, tmp_path, minutes=0.0) == []
    assert [path.name for path in (tmp_path / "run").glob("*.json")] == ["origin.json"]


def test_kinds_and_folders_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    given: dict[str, Any] = {"about": ABOUT, "device": "cpu"}
    with pytest.raises(ModlabError, match="choose some of far, controls"):
        run(tmp_path, None, tmp_path, tmp_path, tmp_path, [2.0], ("near",), **given)
    with pytest.raises(ModlabError, match="--questions"):
        run(tmp_path, None, tmp_path, None, tmp_path, [2.0], ("far", "shots"), **given)


def test_a_saving_that_the_window_alone_exceeds_fails_and_the_others_go_on(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    failed = begun(converted, data, questions, tmp_path, savings=[64.0, 2.0], kinds=("far",))
    assert failed == ["threshold@64"]
    assert "take longer rows" in (tmp_path / "run" / "threshold@64.failed.json").read_text()
    assert (tmp_path / "run" / "far@2.json").exists() and not (tmp_path / "run" / "far@64.json").exists()
