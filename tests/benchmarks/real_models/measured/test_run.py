"""A whole run in tiny, its rows, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_models.__main__ import main
from benchmarks.real_models.measured import fixed
from benchmarks.real_models.measured.join import joined
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
    for part in ("kl_far", "kl_end"):
        assert rows["random", 4.0][part] > rows["random", 2.0][part] > 0
    assert rows["random", 4.0]["kl_end"] != rows["random", 4.0]["kl_far"], "the last quarter alone"
    floor = rows["random", 1.0]
    assert abs(floor["kl_far"]) < 1e-5 and floor["ratio"] > 0.9 and floor["recall_gap"]["256"] < 1e-3
    for name in fixed.NAMES:
        off = rows[f"random: {name}", 4.0]["ratio"] / rows["random", 4.0]["ratio"] - 1
        assert "whole" in name or abs(off) < 0.07, name  # of four heads there is none for so few keys
    assert {2.0, 4.0} & set(CONTROLLED) == {4.0}


def test_settings_of_one_saving_lie_in_one_folder_and_are_told_apart(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    """And a saving that is no power of two. 16 recent tokens are the model's own."""
    data.save(tmp_path / "data")
    out = tmp_path / "run"

    def measured(savings: list[float], recent: list[int] | None) -> list[str]:
        return run(
            converted, None, tmp_path / "data", questions, out, savings, ("far", "controls", "shots"),
            recent=recent, about=ABOUT, device="cpu", fast=False,
            sizes={"rows": 1, "held": 1, "items": 2},
        )  # fmt: skip

    assert measured([3.0, 4.0], None) == []
    before = {path.name: path.read_text() for path in out.glob("*@*.json")}
    assert measured([4.0, 4.0, 3.0], [16, 24, 12]) == []
    after = {path.name: path.read_text() for path in out.glob("*@*.json")}
    assert before == {name: text for name, text in after.items() if "_recent_" not in name}
    assert {name for name in after if name.startswith("far")} == {
        "far@1.json", "far@3.json", "far@4.json", "far@4_recent_24.json", "far@3_recent_12.json",
    }  # fmt: skip
    assert not any("control" in name and "_recent_" in name for name in after), "each saving's first has them"
    for name, saving, recent in (("4_recent_24", 4, 24), ("3_recent_12", 3, 12), ("4", 4, 16), ("3", 3, 16)):
        found = json.loads(after[f"threshold@{name}.json"])
        assert found["recent"] == recent and abs(found["ratio_set"] / saving - 1) < 0.25
    rows = [row for row in joined(out)["rows"] if ": " not in row["arm"]]
    assert [(row["arm"], row["ratio_asked"], row.get("recent")) for row in rows] == [
        ("random", 1.0, None),
        ("random", 3.0, 16), ("random, 12 recent tokens", 3.0, 12),
        ("random", 4.0, 16), ("random, 24 recent tokens", 4.0, 24),
    ]  # fmt: skip
    assert len({row["kl_far"] for row in rows}) == len({row.get("threshold") for row in rows}) == 5
    for row in rows[1:]:
        assert {(task["kind"], task["path"]) for task in row["tasks"].values()} == {
            ("shots", "cache"), ("shots", "whole rows"),
        }  # fmt: skip


def test_a_saving_without_its_own_recent_tokens_has_the_name_of_the_arm(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    data.save(tmp_path / "data")
    out, given = tmp_path / "run", {"about": ABOUT, "device": "cpu", "fast": False, "sizes": {"rows": 1}}
    run(converted, None, tmp_path / "data", questions, out, [2.0], ("far",), recent=[24], **given)
    assert [(row["arm"], row["ratio_asked"]) for row in joined(out)["rows"]] == [
        ("random", 1.0),
        ("random", 2.0),
    ]


def test_a_setting_of_which_only_the_threshold_is_known_is_no_row(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    data.save(tmp_path / "data")
    out, given = tmp_path / "run", {"about": ABOUT, "device": "cpu", "fast": False, "sizes": {"rows": 1}}
    run(converted, None, tmp_path / "data", questions, out, [2.0], ("far",), **given)
    measured = joined(out)["rows"]
    (out / "threshold@4.json").write_text((out / "threshold@2.json").read_text())
    assert joined(out)["rows"] == measured and measured[1]["threshold"]


def test_settings_that_are_none_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for savings, recent, said in (
        ([2.0, 4.0], [16], "1 numbers of recent tokens for 2 savings"),
        ([4.0, 4.0], [16, 16], "4_recent_16 is asked for twice"),
        ([4.0, 2.0, 4.0], None, "4 is asked for twice"),
    ):
        with pytest.raises(ModlabError, match=said):
            run(
                tmp_path, None, tmp_path, tmp_path, tmp_path, savings, (), recent=recent, about=ABOUT,
                device="cpu",
            )  # fmt: skip


def test_what_is_beyond_the_time_is_not_begun(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    assert begun(converted, data, questions, tmp_path, minutes=0.0) == []
    assert [path.name for path in (tmp_path / "run").glob("*.json")] == ["origin.json"]


def test_the_command_measures_in_fewer_bits_without_fast_generation(
    converted: Path, data: Data, questions: Path, tmp_path: Path
) -> None:
    data.save(tmp_path / "data")
    words = {
        "--model": converted, "--data": tmp_path / "data", "--questions": questions,
        "--out": tmp_path / "run", "--savings": "16,8", "--kv-cache-dtype": "k6v4",
        "--only": "far,ruler,humaneval", "--device": "cpu", "--sizes": json.dumps(SIZES),
    }  # fmt: skip
    main(["measure", "--slow", *(str(word) for pair in words.items() for word in pair)])
    found = joined(tmp_path / "run")
    assert found["kv_cache_dtype"] == "k6v4" and found["failed"] == []
    rows = {row["ratio_asked"]: row for row in found["rows"]}
    assert rows.keys() == {1.0, 8.0, 16.0} and {row["arm"] for row in found["rows"]} == {"distil-k6v4"}
    for saving in (8.0, 16.0):
        assert abs(rows[saving]["ratio"] / saving - 1) < 0.25
        assert {task["kind"] for task in rows[saving]["tasks"].values()} == {"ruler", "humaneval"}
    assert 0 < rows[8.0]["kl_far"] < rows[16.0]["kl_far"]


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


@pytest.mark.parametrize("stored_as", ["int8", "k6v4"])
def test_fewer_bits_have_folders_and_rows_of_their_own(
    converted: Path, data: Data, questions: Path, tmp_path: Path, stored_as: str
) -> None:
    """Controls are rounded alike, and all keys kept are fewer bits alone."""
    given: dict[str, Any] = {"about": ABOUT, "device": "cpu", "fast": False}
    sizes = {"rows": 1, "held": 1, "controls": ["window alone", "whole heads"]}
    data.save(tmp_path / "data")
    for name, dtype in (("plain", "auto"), ("rounded", stored_as)):
        failed = run(
            converted, None, tmp_path / "data", questions, tmp_path / name, [8.0], ("far", "controls"),
            sizes=sizes, kv_cache_dtype=dtype, dense=tmp_path / "dense.pt", **given,
        )  # fmt: skip
        assert failed == []
    plain, rounded = (joined(tmp_path / name) for name in ("plain", "rounded"))
    assert (plain["kv_cache_dtype"], rounded["kv_cache_dtype"]) == ("auto", stored_as)
    for record in (plain, rounded):
        assert {row["kv_cache_dtype"] for row in record["rows"]} == {record["kv_cache_dtype"]}
    rows = [{(row["arm"], row["ratio_asked"]): row for row in one["rows"]} for one in (plain, rounded)]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 4
    for arm in ("random", "random: window alone", "random: whole heads"):
        of_plain, of_rounded = (one[arm, 8.0] for one in rows)
        assert of_rounded["keys"] > 1.5 * of_plain["keys"], "the bytes are equal, so more is kept"
        assert of_rounded["kl_far"] < of_plain["kl_far"]
    of_plain, of_rounded = (one["random", 1.0] for one in rows)
    assert of_rounded["ratio"] > 2.5 * of_plain["ratio"]
    assert of_rounded["kl_far"] > 10 * abs(of_plain["kl_far"])
    with pytest.raises(ModlabError, match=f"was measured with kv_cache_dtype='auto', not '{stored_as}'"):
        run(
            converted, None, tmp_path / "data", questions, tmp_path / "plain", [8.0], ("far",),
            kv_cache_dtype=stored_as, **given,
        )  # fmt: skip
