"""Measures and probes over the processes of an accelerator are what one process finds."""

import json
from pathlib import Path

import pytest

from tests.helpers.launch import launch

SCRIPT = Path(__file__).with_name("measuring_processes.py")


def reports(folder: Path, processes: int) -> list[dict]:
    folder.mkdir()
    launch(SCRIPT, processes, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (alone,), both = reports(tmp_path / "one", 1), reports(tmp_path / "two", 2)
    assert [one["processes"] for one in both] == [2, 2] and alone["processes"] == 1
    assert both[0] == both[1]  # merged once: each process has the whole table, times included
    found = both[0]
    for name in ("predicted_tokens", "kv_bytes", "dense_kv_bytes"):
        assert found["evaluate"][name] == alone["evaluate"][name]
    for name in ("loss", "keep_ratio", "keep_ratio_by_layer"):
        assert found["evaluate"][name] == pytest.approx(alone["evaluate"][name], rel=1e-12)
    assert found["rows"] == pytest.approx(alone["rows"], rel=1e-12)
    assert found["probed"] == alone["probed"]
    assert found["sweep"].keys() == alone["sweep"].keys()
    for name, values in alone["sweep"].items():
        assert found["sweep"][name] == pytest.approx(values, rel=1e-12, nan_ok=True), name
