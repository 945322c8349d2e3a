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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process finds."""
    (found,) = reports(tmp_path_factory.mktemp("alone") / "one", 1)
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_find_what_one_finds(tmp_path: Path, alone: dict, processes: int) -> None:
    """With four, some have nothing to do in the last round."""
    several = reports(tmp_path / "several", processes)
    assert alone["processes"] == 1 and [one["processes"] for one in several] == [processes] * processes
    bars = [one.pop("bar") for one in several]
    assert bars == [alone["bar"], *[0] * (processes - 1)], "one process shows the bar, of all batches"
    assert all(one == several[0] for one in several)  # merged once: each has the whole table, times included
    found = several[0]
    assert found["generated"] == alone["generated"], "in the order of the batches"
    for name in ("predicted_tokens", "kv_bytes", "dense_kv_bytes"):
        assert found["evaluate"][name] == alone["evaluate"][name]
    for name in ("loss", "keep_ratio", "keep_ratio_by_layer"):
        assert found["evaluate"][name] == pytest.approx(alone["evaluate"][name], rel=1e-12)
    assert found["rows"] == pytest.approx(alone["rows"], rel=1e-12)
    assert found["probed"] == alone["probed"]
    assert found["sweep"].keys() == alone["sweep"].keys()
    for name, values in alone["sweep"].items():
        assert found["sweep"][name] == pytest.approx(values, rel=1e-12, nan_ok=True), name
