"""The run of everything that is measured on GPUs: lanes, their limit, what it leaves."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import on_gpu

SHOW_GPU = "import os; print('gpu', os.environ.get('CUDA_VISIBLE_DEVICES'))"


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that end by themselves, but for "slow". That one begins when "bad" and "good" are done, and the
    limit comes then: how fast this machine starts processes decides nothing."""
    steps = {
        "good": ["-c", SHOW_GPU],
        "bad": ["-c", "raise SystemExit(3)"],
        "slow": ["-c", "import time; time.sleep(900); print('not ended')"],
    }
    command = on_gpu.Lanes.command

    def command_at_its_time(lanes: on_gpu.Lanes, step: str, gpus: int = 1) -> list[str]:
        if step == "slow":
            while not {"bad", "good"} <= set(lanes.outcomes) and time.monotonic() < lanes.deadline:
                time.sleep(0.01)
            lanes.deadline = time.monotonic() + 0.2
        return command(lanes, step, gpus)

    monkeypatch.setattr(on_gpu.Lanes, "command", command_at_its_time)
    monkeypatch.setattr(on_gpu, "STEPS", steps | {"late": steps["good"]})


def test_lanes_run_side_by_side_until_the_limit(
    small_steps: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu.main(["--out", str(tmp_path), "--seconds", "300", "0:bad,slow,late", "1:good"])
    said = capsys.readouterr().out
    assert "=== bad: exit 3" in said and "=== good: exit 0" in said
    assert "=== slow: ended by the limit" in said and "=== late: not begun" in said
    assert (tmp_path / "good.log").read_text() == "gpu 1\n" and (tmp_path / "slow.log").read_text() == ""
    with tarfile.open(tmp_path / "measured.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["bad.log", "good.log", "slow.log"]


def test_every_step_is_told_where_its_results_go(tmp_path: Path) -> None:
    lanes = on_gpu.Lanes(tmp_path, 600, "abc", ["--results", "elsewhere"])
    assert "--out" in lanes.command("speed") and "abc" in lanes.command("speed")
    arms = lanes.command("arms")
    assert arms[-6:-4] == ["--results", "elsewhere"] and arms[-2:] == ["--commit", "abc"]
    assert 9 < float(arms[arms.index("--minutes") + 1]) < 10
    assert "abc" not in lanes.command("base") + lanes.command("tests")
    assert lanes.command("base", gpus=2)[1:6] == [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    assert lanes.command("base", gpus=2)[6:9] == ["-m", "benchmarks.quality", "base"]
    assert "accelerate.commands.launch" not in lanes.command("arms", gpus=2)


@pytest.mark.parametrize("lane", ["0:nothing", "speed", "x:speed", "0:"])
def test_a_lane_that_is_none(lane: str) -> None:
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", "unused", lane])
