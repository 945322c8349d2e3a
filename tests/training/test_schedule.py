"""Learning rate and keep ratio by step and share of the run."""

from __future__ import annotations

import pytest
import torch

from modlab.recipes import RECIPES
from modlab.training.loop import TrainConfig
from modlab.training.schedule import keep_target, lr_factor, ramped_target


def test_ramp_falls_from_everything_to_the_target() -> None:
    values = [ramped_target(0.2, progress, 0.5) for progress in (0, 0.25, 0.5, 1)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert ramped_target(0.2, 0.0, 0.0) == 0.2


def test_keep_target_holds_falls_and_spreads() -> None:
    config = TrainConfig(steps=1, keep_ratio=0.2, hold=0.25, ramp=0.5)
    assert [keep_target(config, 0, share) for share in (0.0, 0.2)] == [1.0, 1.0]
    assert keep_target(config, 0, 0.5) == pytest.approx(0.6)
    assert keep_target(config, 0, 0.9) == pytest.approx(0.2)
    config = TrainConfig(steps=1, objective="budget", keep_ratio=0.5, keep_range=(0.4, 0.8), ramp=0.0)
    targets = torch.tensor([keep_target(config, step, 0.5) for step in range(100)])
    assert 0.4 <= targets.min() < 0.41 and 0.79 < targets.max() <= 0.8
    assert targets[:10].mean().item() == pytest.approx(0.6, abs=0.03)


def test_lr_schedule() -> None:
    config = TrainConfig(steps=100, warmup=10, min_lr_ratio=0.1)
    factors = [lr_factor(config, s, s / 100) for s in range(100)]
    assert factors[0] == pytest.approx(0.1, rel=0.01) and factors[4] == pytest.approx(0.5, rel=0.02)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[-1] < 0.105
    assert lr_factor(TrainConfig(steps=100, warmup=0), 0, 0.0) == 1.0
    assert lr_factor(TrainConfig(steps=1, warmup=0, cooldown=0.0), 0, 0.9) == 1.0
    assert lr_factor(TrainConfig(max_minutes=1, warmup=0.1), 0, 0.05) == pytest.approx(0.5, rel=0.01)


def test_rates_stay_up_until_the_cooldown() -> None:
    config = TrainConfig(steps=100, warmup=10, min_lr_ratio=0.0, cooldown=0.3)
    factors = [lr_factor(config, s, s / 100) for s in range(101)]
    assert set(factors[10:71]) == {1.0}
    assert factors[70:] == sorted(factors[70:], reverse=True)
    assert factors[85] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["distil", "safe", "default", "memory", "speed"])
def test_distilled_recipes_cool_down_once_the_target_is_reached(name: str) -> None:
    config = TrainConfig(steps=100, keep_ratio=0.25, **RECIPES[name].train)
    reached = next(s for s in range(101) if keep_target(config, s, s / 100) <= 0.04)
    assert lr_factor(config, reached, reached / 100) == 1.0
    assert lr_factor(config, 100, 1.0) == pytest.approx(0.0, abs=1e-12)
