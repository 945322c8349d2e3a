"""A Trainer in several processes trains the routers as in one with the same rows."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.launch import launch
from tests.helpers.steps import ROWS
from tests.helpers.trainers import first_gradient

WORKER = Path(__file__).with_name("train_in_processes.py")


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    """Labels are uneven, the objective is over the rows of both, and each row has noise of its own."""
    launch(WORKER, 2, tmp_path, ROWS // 2, 1)
    expected = first_gradient(str(tmp_path), ROWS, 1)
    assert any("mod_router" in name for name in expected)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt")
        for name, value in expected.items():
            assert (found[name] - value).norm() < 1e-4 * value.norm(), name
