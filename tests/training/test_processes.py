"""Several processes do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def launch(out: Path, processes: int, batch_size: int) -> list[dict[str, Any]]:
    """The worker under `accelerate launch`; one report a rank."""
    out.mkdir()
    worker = Path(__file__).with_name("train_in_processes.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[2])}
    environment["ACCELERATE_USE_CPU"] = "true"
    if (
        processes > 1
    ):  # the launcher of local process groups carries this name on CPUs too; port 0 picks a free one
        command += ["--multi_gpu", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(worker), str(out), str(batch_size)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    (alone,) = launch(tmp_path / "one", 1, 4)
    pair = launch(tmp_path / "two", 2, 2)
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
