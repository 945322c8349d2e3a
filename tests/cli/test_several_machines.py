"""`accelerate launch -m modlab train` on two machines that share nothing but a network: here, loopback."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modlab.cli.program import main
from tests.helpers.launch import together


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_two_machines_train_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(900)))
    train = ["train", "demo-dense", "--data", str(text), "--steps", "2", "--seq-len", "192", "--no-calibrate"]
    train += ["--recipe", "layers"]  # what distils needs two rows a process
    train += ["--heldout-tokens", "0", "--log-every", "1", "--mixed-precision", "no", "--num-workers", "0"]

    def command(rank: int) -> list[str]:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        launch += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [*launch, "-m", "modlab", *train, "--batch-size", "1", "--out", str(tmp_path / "two")]

    port = free_port()
    printed = together([command(0), command(1)])
    assert "finished after 2 steps" in printed[0] and not printed[1].strip(), "one rank prints"
    assert main([*train, "--batch-size", "2", "--out", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for alone, both in zip(*logs, strict=True):
        for figure in ("loss", "keep_ratio", "grad_norm", "tokens"):
            assert both[figure] == pytest.approx(alone[figure], rel=1e-3), figure
    weights, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert found.keys() == weights.keys() and (tmp_path / "two" / "model" / "config.json").exists()
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), name
