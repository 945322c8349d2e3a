"""Thresholds that follow the gates: the right quantile, of all layers or each, in one process or many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab.routing.record import RoutingStep
from modlab.training.loop import TrainConfig, train
from modlab.training.threshold_control import BINS, DECAY, EDGE, ThresholdControl
from tests.helpers.models import scatter_gates
from tests.helpers.training import settings

CPU = torch.device("cpu")
BIN = 2 * EDGE / BINS


def step_of(logits: dict[int, torch.Tensor], real: torch.Tensor | None = None) -> RoutingStep:
    shape = next(iter(logits.values())).shape
    real = torch.ones(shape, dtype=torch.bool) if real is None else real
    step = RoutingStep(real, torch.arange(shape[1]).expand(shape))
    step.logit.update(logits)
    return step


def take_in(control: ThresholdControl, *parts: RoutingStep, keep_first: int) -> None:
    """One step of one process, in these forwards."""
    for part in parts:
        control.see(part, keep_first)
    control.advance(lambda counts: counts)


def kept(logits: torch.Tensor, p: torch.Tensor) -> float:
    return (torch.sigmoid(logits) >= p).float().mean().item()


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("per_layer", [True, False])
def test_the_wanted_share_is_kept(ratio: float, per_layer: bool) -> None:
    torch.manual_seed(0)
    logits = {1: torch.randn(8, 500) - 2, 4: 3 * torch.randn(8, 500)}
    control = ThresholdControl([1, 4], per_layer, CPU)
    take_in(control, step_of(logits), keep_first=0)
    p = control.thresholds(ratio)
    shares = [kept(logits[i], p[i]) for i in (1, 4)]
    if per_layer:
        assert shares == pytest.approx([ratio, ratio], abs=0.01)
        assert p[1] != p[4]
    else:
        assert sum(shares) / 2 == pytest.approx(ratio, abs=0.01) and p[1] == p[4]


def test_nothing_seen_or_everything_wanted_keeps_everything() -> None:
    control = ThresholdControl([0], False, CPU)
    assert control.thresholds(0.2)[0] <= 1e-6
    take_in(control, step_of({0: torch.randn(2, 50)}), keep_first=0)
    assert control.thresholds(1.0)[0] <= 1e-6


def test_gates_that_are_all_alike_are_kept() -> None:
    logits = torch.full((2, 50), 1.9924)
    control = ThresholdControl([0], False, CPU)
    take_in(control, step_of({0: logits}), keep_first=0)
    assert kept(logits, control.thresholds(0.25)[0]) == 1.0


def test_protected_tokens_count_as_kept_and_padding_not_at_all() -> None:
    logits = torch.linspace(-4, 4, 100).expand(3, 100).clone()
    real = torch.ones(3, 100, dtype=torch.bool)
    real[:, 60:] = False
    control = ThresholdControl([0], False, CPU)
    take_in(control, step_of({0: logits}, real), keep_first=10)
    p = control.thresholds(0.5)[0]
    keep = ((torch.sigmoid(logits) >= p) | (torch.arange(100) < 10)) & real
    assert keep.sum().item() / real.sum().item() == pytest.approx(0.5, abs=0.02)


def test_old_steps_fade() -> None:
    control = ThresholdControl([0], False, CPU)
    take_in(control, step_of({0: torch.full((1, 100), -3.0)}), keep_first=0)
    for _ in range(50):
        take_in(control, step_of({0: torch.linspace(0, 1, 100)[None]}), keep_first=0)
    assert DECAY**50 < 0.01
    assert torch.logit(control.thresholds(0.5)[0]).item() == pytest.approx(0.5, abs=0.05)


def test_processes_agree_and_checkpoints_carry_it() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 100), torch.randn(2, 100) + 1]
    alone = ThresholdControl([0], False, CPU)
    take_in(alone, step_of({0: torch.cat(parts)}), keep_first=2)
    ranks = [ThresholdControl([0], False, CPU) for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        rank.see(step_of({0: part}), keep_first=2)
    together = ranks[0].seen_RZ + ranks[1].seen_RZ
    for rank in ranks:
        rank.advance(lambda _: together)
        assert torch.equal(rank.counts_RZ, alone.counts_RZ)
    again = ThresholdControl([0], False, CPU)
    again.restore(alone.state())
    assert again.thresholds(0.4) == alone.thresholds(0.4)


def test_parts_of_a_step_count_as_one_step() -> None:
    torch.manual_seed(0)
    before = step_of({0: torch.randn(4, 100)})
    parts = [step_of({0: torch.randn(2, 100) + i}) for i in range(2)]
    whole = step_of({0: torch.cat([part.logit[0] for part in parts])})
    cut, uncut = (ThresholdControl([0], False, CPU) for _ in range(2))
    for control in (cut, uncut):
        take_in(control, before, keep_first=2)
    take_in(cut, *parts, keep_first=2)
    take_in(uncut, whole, keep_first=2)
    assert torch.equal(cut.counts_RZ, uncut.counts_RZ)


def test_resolution() -> None:
    """A threshold lies at a bin's lower edge: never above the wanted quantile, at most one bin below it."""
    logits = torch.linspace(-1, 1, 4000)[None]
    control = ThresholdControl([0], False, CPU)
    take_in(control, step_of({0: logits}), keep_first=0)
    exact = logits.quantile(0.7).item()
    assert exact - BIN - 1e-3 <= torch.logit(control.thresholds(0.3)[0]).item() <= exact + 1e-3


def test_budget_keeps_what_is_asked_at_every_step(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
    scatter_gates(model)
    config = settings(steps=40, objective="budget", keep_ratio=0.4, hold=0.25, ramp=0.0, log_every=1)
    history = train(model, rows, TrainConfig(**config), eval_data=rows[:32]).history
    assert history["keep_ratio"][:10].tolist() == [1.0] * 10 == history["target"][:10].tolist()
    assert history["keep_ratio"][20:].mean() == pytest.approx(0.4, abs=0.03)
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(0.4, abs=0.03)
    assert all(isinstance(p, float) for p in model.mod.thresholds.values())


def test_budget_over_a_range_ends_at_the_keep_ratio(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
    scatter_gates(model)
    config = settings(
        steps=40, objective="budget", keep_ratio=0.5, keep_range=(0.3, 0.9), ramp=0.0, calibrate=True
    )
    history = train(model, rows, TrainConfig(**config), eval_data=rows[:32]).history
    assert history["keep_ratio"][5:].min() < 0.45 and history["keep_ratio"][5:].max() > 0.75
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(0.5, abs=0.03)


def test_a_stopped_budget_run_leaves_plain_thresholds(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    class Stop:
        def step(self, step: int, share: float) -> bool:
            assert all(isinstance(p, float) for p in model.mod.thresholds.values())
            return step < 7

        def log(self, row: dict[str, Any]) -> None:
            pass

    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
    scatter_gates(model)
    config = settings(steps=20, objective="budget", keep_ratio=0.4, ramp=0.0, log_every=10)
    assert train(model, rows, TrainConfig(**config), monitor=Stop()).interrupted
    model.save_pretrained(tmp_path / "model")


def test_a_failed_budget_run_leaves_a_model_that_can_be_saved(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    """It fails within a step, whose thresholds are tensors; also before its first step is done."""
    for step in (1, 3):
        model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
        scatter_gates(model)
        calls: list[int] = []

        def fail(*args: Any, calls: list[int] = calls, step: int = step) -> None:
            calls.append(1)
            if len(calls) == step:
                raise RuntimeError("out of memory")

        hook = model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            config = settings(steps=9, objective="budget", keep_ratio=0.4, ramp=0.0)
            train(model, rows, TrainConfig(**config))
        hook.remove()
        assert all(type(p) is float and 0 < p < 1 for p in model.mod.thresholds.values())
        model.save_pretrained(tmp_path / str(step))
        assert not model.training and model.mod.what_if and model.mod.noise is None
