"""Sums of the figures since the last log line."""

from __future__ import annotations

import pytest
import torch

from modlab.training.window import FIGURES, Window

CPU = torch.device("cpu")


def figures(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name in (*FIGURES, "keep_3")}


def test_figures_add_up_over_steps_and_processes() -> None:
    ranks = [Window([3], CPU) for _ in range(2)]
    for rank, window in enumerate(ranks):
        for step in range(3):
            window.add(figures(10.0**rank * (step + 1)))
    together = sum(torch.stack(list(window.sums.values())) for window in ranks)
    assert ranks[0].read(lambda _: together) == dict.fromkeys(figures(0), 66.0)
    assert ranks[0].steps == 3
    ranks[0].clear()
    assert ranks[0].read(lambda own: own) == dict.fromkeys(figures(0), 0.0) and ranks[0].steps == 0


def test_one_process_goes_on_with_what_all_had() -> None:
    saved = dict.fromkeys(figures(0), 66.0)
    ranks = [Window([3], CPU) for _ in range(2)]
    for rank, window in enumerate(ranks):
        window.restore(saved, 3, is_main=rank == 0)
    together = sum(torch.stack(list(window.sums.values())) for window in ranks)
    assert ranks[1].read(lambda _: together) == saved and ranks[1].steps == 3
    with pytest.raises(ValueError, match="window has the figures"):
        ranks[0].restore({"loss": 1.0}, 3, is_main=True)
