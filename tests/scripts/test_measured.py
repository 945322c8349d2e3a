"""The table of what is asked of real models: every cell follows from the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.pages import bits, measured, real_models


def task(kind: str, score: float, dense: float) -> dict[str, Any]:
    gap = {"score": score, "dense": dense, "difference": score - dense, "stderr": 0.01, "items": 10}
    return {"kind": kind, **gap}


def row(saving: float, arm: str = "a", kl: float = 0.01, gap: float = 0.01, **more: Any) -> dict[str, Any]:
    recall = {"recall_gap": {"256": 0.0, "7000": gap}, "recall_gap_stderr": {"256": 0.1, "7000": 0.002}}
    return {
        "arm": arm, "ratio_asked": saving, "ratio": saving * 0.99, "ratio_by_text": {"x": saving, "y": 1.0},
        "kl_far": kl, **recall,
        "retrieval_of_dense": {"256": 1.0, "7000": 0.985}, "tasks": {}, **more,
    }  # fmt: skip


def page(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    record = {
        "what": "real_measured", "model": "m", "arm": "a", "tokens": 5, "device_name": "d", "dtype": "t",
        "versions": {"torch": "9"}, "date": "2026-01-01", "commit": "c", "command": "go", "note": "Note.",
        "rows": rows,
    }  # fmt: skip
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "real_m_2026-01-01.json").write_text(json.dumps(record))
    return measured.block(tmp_path)


def line(said: str, begins: str) -> list[str]:
    (found,) = (one for one in said.splitlines() if one.startswith(f"| {begins}"))
    return [cell.strip() for cell in found.split("|")[2:-1]]


def test_without_a_record_the_page_says_so(tmp_path: Path) -> None:
    assert measured.block(tmp_path) == measured.NONE


def test_cells_say_what_was_asked_got_and_whether_it_is_enough(tmp_path: Path) -> None:
    tasks = {
        "needle 4096": task("ruler", 0.96, 1.0), "variables 4096": task("ruler", 0.0, 0.2),
        "humaneval": task("humaneval", 0.49, 0.50), "arc": task("shots", 0.402, 0.41),
        "mmlu": task("shots", 0.41, 0.41),
    }  # fmt: skip
    said = page(tmp_path, [row(1.0, kl=0.0004), row(4.0, tasks=tasks), row(8.0, kl=0.05, ratio=7.0)])
    assert "rounding" in said and "0.0004" in said
    assert line(said, "KL to dense") == [
        "not measured",
        "0.0100, ≤ 0.015: met",
        "0.0500, ≤ 0.04: **missed**",
        "not measured",
    ]
    assert line(said, "loss on a passage")[1] == "0.010 ± 0.002, ≤ 0.02: met"
    assert line(said, "retrieval")[1] == "0.985, ≥ 0.98: met"
    assert line(said, "RULER")[1] == "0.960 ± 0.010, ≥ 0.97: **missed**"  # of what dense passes
    assert line(said, "HumanEval")[1] == "1.00 ± 1.00, ≤ 2: met"
    assert line(said, "many shots")[1] == "0.40 ± 0.71, ≤ 0.5: met"
    assert line(said, "ratio got")[1:3] == [
        "3.96x (1.0x to 4.0x)",
        "7.00x (1.0x to 8.0x) **(less than asked)**",
    ]
    assert line(said, "needle 4096")[2:5] == ["-", "0.960 (-0.040 ± 0.010)", "-"]


def test_one_table_says_which_models_meet_what(tmp_path: Path) -> None:
    page(tmp_path, [row(2.0, kl=0.001), row(4.0, kl=0.02), row(4.0, "a: chance", kl=0.04)])
    folder = tmp_path / "benchmarks" / "results"
    record = json.loads((folder / "real_m_2026-01-01.json").read_text())
    other = record | {"model": "n", "rows": [row(4.0, kl=0.001)]}
    (folder / "real_n_2026-01-01.json").write_text(json.dumps(other))
    varied = record | {"arm": "a, longer", "rows": [row(4.0, "a, longer", kl=0.001)]}
    (folder / "real_m_2026-01-02.json").write_text(json.dumps(varied))
    said = measured.verdicts(tmp_path)
    assert line(said, "KL to dense")[:3] == [
        "≤ 0.004: met: m (0.0010); not measured: n",
        "≤ 0.015: met: n (0.0010); **missed**: m (0.0200)",
        "≤ 0.04: not measured: m, n",
    ]
    assert line(said, "retrieval")[1] == "≥ 0.98: met: m (0.985), n (0.985)"
    assert line(said, "KL over")[:2] == ["-", "≤ 0.333: **missed**: m (0.50); not measured: n"]


def test_the_best_control_of_each_measure_counts(tmp_path: Path) -> None:
    controls = [row(4.0, "a: chance", kl=0.04, gap=0.5), row(4.0, "a: window alone", kl=0.02, gap=0.9)]
    said = page(tmp_path, [row(4.0), *controls])
    assert line(said, "KL over")[1] == "0.50, ≤ 0.333: **missed**"
    assert line(said, "worst recall gap over")[1] == "0.02, ≤ 0.333: met"
    assert said.count("| chance | 4x | 3.96x | 0.0400 |") == 1 and "| **gates** | 4x |" in said
    assert line(said, "KL over")[2] == "not measured"


def test_the_newest_record_of_a_model_counts(tmp_path: Path) -> None:
    page(tmp_path, [row(4.0)])
    old = tmp_path / "benchmarks" / "results" / "real_m_2025-01-01.json"
    record = json.loads((tmp_path / "benchmarks" / "results" / "real_m_2026-01-01.json").read_text())
    old.write_text(json.dumps(record | {"date": "2025-01-01", "note": "Old."}))
    assert "Old." not in measured.block(tmp_path) and "Note." in measured.block(tmp_path)


def test_a_variation_of_what_ships_has_a_short_table_and_hides_nothing(tmp_path: Path) -> None:
    without = page(tmp_path, [row(1.0, kl=0.0004), row(4.0)])
    folder = tmp_path / "benchmarks" / "results"
    record = json.loads((folder / "real_m_2026-01-01.json").read_text())
    rows = [row(saving, "a, longer", kl=0.0007 * saving) for saving in (1.0, 2.0, 4.0)]
    rows.append(row(4.0, "a, longer: chance", kl=0.2))
    new = record | {"arm": "a, longer", "date": "2026-02-02", "note": "No better.", "rows": rows}
    (folder / "real_m_2026-02-02.json").write_text(json.dumps(new))
    said = measured.block(tmp_path)
    assert said.startswith(without)
    told = said.removeprefix(without).splitlines()
    assert "'a, longer'" in said and "No better." in said
    assert told[4].startswith("| not shipped |") and [one.split(" |")[0] for one in told[6:]] == [
        "| 2x",
        "| 4x",
    ]
    assert "0.0028" in told[7] and "chance" not in said
    assert [measured.ships(one) for one in measured.records(tmp_path)] == [True, False]


def test_retrieval_counts_where_the_dense_model_can_do_it(tmp_path: Path) -> None:
    shares = {
        "retrieval_dense": {"256": 0.76, "7000": 0.08},
        "retrieval_of_dense": {"256": 0.96, "7000": 0.1},
    }
    said = page(tmp_path, [row(1.0, **shares), row(4.0, **shares)])
    assert line(said, "retrieval")[1] == "0.960, ≥ 0.98: **missed**"
    assert "The dense model answers 0.76 at 256, 0.08 at 7,000 tokens" in said
    shares["retrieval_dense"]["256"] = 0.4
    assert line(page(tmp_path, [row(4.0, **shares)]), "retrieval")[1] == "not measured"


def test_other_savings_and_other_recent_tokens_have_a_table_of_their_own(tmp_path: Path) -> None:
    """And leave the columns of the first as they are."""
    tasks = {"needle 4096": task("ruler", 0.9, 1.0), "arc": task("shots", 0.40, 0.41)}
    plain = [row(1.0, kl=0.0004), row(4.0, recent=1512), row(4.0, "a: chance", kl=0.04, gap=0.5)]
    without = page(tmp_path, plain)
    assert "| also |" not in without
    more = [
        row(3.0, recent=700, kl=0.007, tasks=tasks), row(3.0, "a: chance", kl=0.02),
        row(4.0, "a, 384 recent tokens", recent=384, kl=0.0123, gap=0.004),
        row(4.0, "a, 384 recent tokens: chance", kl=0.001, gap=0.001),
        {"arm": "a", "ratio_asked": 6.0, "tasks": {}},
    ]  # fmt: skip
    said = page(tmp_path, plain + more)
    lines = said.splitlines()
    at = next(i for i, one in enumerate(lines) if one.startswith("| also |"))
    kept = [one for i, one in enumerate(lines) if not at - 1 <= i <= at + 4]
    assert kept == without.splitlines()
    assert [cell.count("|") for cell in lines[at : at + 5]] == [10] * 5
    assert line(said, "3x") == [
        "700", "2.97x (1.0x to 3.0x)", "0.0070", "0.010 ± 0.002", "0.985", "0.900 ± 0.010", "-",
        "1.00 ± 1.00",
    ]  # fmt: skip
    assert lines[at + 3].startswith("| 4x | 384 | 3.96x (1.0x to 4.0x) | 0.0123 | 0.004 ± 0.002 |")
    assert line(said, "6x") == ["-", "not measured", *["-"] * 6]
    assert line(said, "recent tokens") == ["-", "1,512", "-", "-"]
    assert line(said, "KL over")[1] == "0.25, ≤ 0.333: met"


def test_eight_bits_have_tables_of_their_own(tmp_path: Path) -> None:
    """And change nothing in those of the model's own type, where newer or not."""
    without = page(tmp_path, [row(1.0, kl=0.0004), row(4.0)])
    verdicts = measured.verdicts(tmp_path)
    for part in (measured.block, measured.verdicts):
        assert part(tmp_path, measured.INT8) == measured.NONE
    folder = tmp_path / "benchmarks" / "results"
    record = json.loads((folder / "real_m_2026-01-01.json").read_text())
    rows = [row(saving, "a-int8", kl=kl) for saving, kl in ((2.0, 0.003), (4.0, 0.0041))]
    rows += [row(1.0, "a-int8", kl=0.002, ratio=1.8), row(4.0, "a-int8: chance", kl=0.04)]
    new = record | {"arm": "a-int8", "date": "2026-02-02", "rows": rows, "kv_cache_dtype": "int8"}
    (folder / "real_m_2026-02-02.json").write_text(json.dumps(new))
    assert measured.block(tmp_path) == without and measured.verdicts(tmp_path) == verdicts
    said = measured.block(tmp_path, measured.INT8)
    assert "With all keys kept the KL is 0.0020: eight bits, 1.80x." in said and "rounding" not in said
    assert line(said, "KL to dense")[:2] == ["0.0030, ≤ 0.004: met", "0.0041, ≤ 0.015: met"]
    assert line(said, "KL over")[:2] == ["1.50", "0.10, ≤ 0.333: met"]
    assert "| eight bits alone | 2x | 1.80x | 0.0020 |" in said
    assert "met: m (0.0041)" in measured.verdicts(tmp_path, measured.INT8)


@pytest.mark.parametrize("stored", [measured.INT8, measured.K6V4])
def test_no_way_to_store_is_mixed_with_another(tmp_path: Path, stored: str) -> None:
    """Where records of all three are there, the newest being the others'."""
    page(tmp_path, [row(1.0), row(8.0, kl=0.011)])
    folder = tmp_path / "benchmarks" / "results"
    record = json.loads((folder / "real_m_2026-01-01.json").read_text())
    for day, (kind, kl) in enumerate([("int8", 0.022), ("k6v4", 0.033)], 2):
        arm = {"arm": f"a-{kind}", "rows": [row(1.0, f"a-{kind}"), row(8.0, f"a-{kind}", kl=kl)]}
        new = record | arm | {"kv_cache_dtype": kind, "date": f"2026-01-0{day}"}
        (folder / f"real_m_2026-01-0{day}.json").write_text(json.dumps(new))
    figures = {measured.AUTO: "0.0110", measured.INT8: "0.0220", measured.K6V4: "0.0330"}
    for kind, figure in figures.items():
        said = measured.block(tmp_path, kind) + measured.verdicts(tmp_path, kind)
        assert [figure in said for figure in figures.values()] == [figure == own for own in figures.values()]
    assert set(real_models.by_storage(tmp_path)) == {measured.AUTO, measured.INT8}, "recipes know two"
    (one,) = measured.records(tmp_path, stored)
    assert one["kv_cache_dtype"] == stored


def test_six_and_four_bits_have_columns_where_they_were_measured(tmp_path: Path) -> None:
    """Another saving is told below, and what takes the place of rounding is named."""
    page(tmp_path, [])
    file = tmp_path / "benchmarks" / "results" / "real_m_2026-01-01.json"
    rows = [row(1.0, kl=0.01, ratio=2.8), row(4.0, kl=0.02), row(8.0, kl=0.03), row(16.0, kl=0.2)]
    record = json.loads(file.read_text()) | {"kv_cache_dtype": "k6v4", "rows": rows}
    file.write_text(json.dumps(record))
    said = measured.block(tmp_path, measured.K6V4)
    assert "With all keys kept the KL is 0.0100: six bits and four, 2.80x." in said
    assert line(said, "KL to dense") == ["0.0300, ≤ 0.04: met", "0.2000, ≤ 0.1: **missed**"]
    assert line(said, "4x")[2] == "0.0200"
    verdicts = measured.verdicts(tmp_path, measured.K6V4)
    assert line(verdicts, "KL to dense") == ["≤ 0.04: met: m (0.0300)", "≤ 0.1: **missed**: m (0.2000)"]
    assert line(verdicts, "RULER") == ["≥ 0.93: not measured: m", "-"]


def test_ways_to_store_are_compared_at_the_same_saving(tmp_path: Path) -> None:
    page(tmp_path, [row(8.0, kl=0.5, gap=0.04), row(8.0, "a: chance", kl=0.9)])
    folder = tmp_path / "benchmarks" / "results"
    record = json.loads((folder / "real_m_2026-01-01.json").read_text())
    new = {"arm": "b", "kv_cache_dtype": "k6v4", "rows": [row(1.0, "b", ratio=2.8), row(8.0, "b", kl=0.25)]}
    (folder / "real_m_2026-01-02.json").write_text(json.dumps(record | new))
    lines = bits.block(tmp_path).splitlines()
    assert lines[0].startswith("| | stored in | m: got;") and len(lines) == 2 + 3 * 3
    told = {tuple(one.split(" | ")[:2]): one.split(" | ")[2] for one in lines[2:]}
    assert told["| 8x", "16 bits"] == "7.92x; 0.5000, 0.040 ± 0.002, 0.985 |"
    assert told["| 8x", bits.STORED["k6v4"]].startswith("7.92x; 0.2500, ")
    assert told["| all keys kept", bits.STORED["k6v4"]].startswith("2.80x; ")
    assert told["| 8x", "eight bits"] == told["| 16x", bits.STORED["k6v4"]] == "- |"


def test_the_best_way_to_store_is_another_at_another_saving(tmp_path: Path) -> None:
    page(tmp_path, [row(8.0, kl=0.011)])
    folder = tmp_path / "benchmarks" / "results"
    record = json.loads((folder / "real_m_2026-01-01.json").read_text())
    for day, (kind, kl) in enumerate([("int8", 0.022), ("k6v4", 0.033)], 2):
        arm = {"arm": f"a-{kind}", "rows": [row(s, f"a-{kind}", kl=kl) for s in (2.0, 4.0, 8.0, 16.0)]}
        new = record | arm | {"kv_cache_dtype": kind, "date": f"2026-01-0{day}"}
        (folder / f"real_m_2026-01-0{day}.json").write_text(json.dumps(new))
    said = measured.best_verdicts(tmp_path)
    assert said.splitlines()[0].count("eight bits") == 3 and "| 16x, six bits and four |" in said
    assert [("0.0220" in cell, "0.0330" in cell) for cell in line(said, "KL to dense")] == [
        *[(True, False)] * 3,
        (False, True),
    ]
    assert measured.best_verdicts(tmp_path / "nothing") == measured.NONE
