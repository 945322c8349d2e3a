"""Thresholds that follow the gates: the right quantile, of all layers or each, in one process or many."""

from __future__ import annotations

import pytest
import torch

from modlab.routing.state import RoutingStep
from modlab.training.threshold_control import BINS, DECAY, EDGE, ThresholdControl

CPU = torch.device("cpu")
BIN = 2 * EDGE / BINS


def step_of(logits: dict[int, torch.Tensor], real: torch.Tensor | None = None) -> RoutingStep:
    shape = next(iter(logits.values())).shape
    real = torch.ones(shape, dtype=torch.bool) if real is None else real
    step = RoutingStep(real, torch.arange(shape[1]).expand(shape))
    step.logit.update(logits)
    return step


def kept(logits: torch.Tensor, p: torch.Tensor) -> float:
    return (torch.sigmoid(logits) >= p).float().mean().item()


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("per_layer", [True, False])
def test_the_wanted_share_is_kept(ratio: float, per_layer: bool) -> None:
    torch.manual_seed(0)
    logits = {1: torch.randn(8, 500) - 2, 4: 3 * torch.randn(8, 500)}
    control = ThresholdControl([1, 4], per_layer, CPU)
    control.update(step_of(logits), keep_first=0)
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
    control.update(step_of({0: torch.randn(2, 50)}), keep_first=0)
    assert control.thresholds(1.0)[0] <= 1e-6


def test_gates_that_are_all_alike_are_kept() -> None:
    logits = torch.full((2, 50), 1.9924)
    control = ThresholdControl([0], False, CPU)
    control.update(step_of({0: logits}), keep_first=0)
    assert kept(logits, control.thresholds(0.25)[0]) == 1.0


def test_protected_tokens_count_as_kept_and_padding_not_at_all() -> None:
    logits = torch.linspace(-4, 4, 100).expand(3, 100).clone()
    real = torch.ones(3, 100, dtype=torch.bool)
    real[:, 60:] = False
    control = ThresholdControl([0], False, CPU)
    control.update(step_of({0: logits}, real), keep_first=10)
    p = control.thresholds(0.5)[0]
    keep = ((torch.sigmoid(logits) >= p) | (torch.arange(100) < 10)) & real
    assert keep.sum().item() / real.sum().item() == pytest.approx(0.5, abs=0.02)


def test_old_steps_fade() -> None:
    control = ThresholdControl([0], False, CPU)
    control.update(step_of({0: torch.full((1, 100), -3.0)}), keep_first=0)
    for _ in range(50):
        control.update(step_of({0: torch.linspace(0, 1, 100)[None]}), keep_first=0)
    assert DECAY**50 < 0.01
    assert torch.logit(control.thresholds(0.5)[0]).item() == pytest.approx(0.5, abs=0.05)


def test_processes_agree_and_checkpoints_carry_it() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 100), torch.randn(2, 100) + 1]
    alone = ThresholdControl([0], False, CPU)
    alone.update(step_of({0: torch.cat(parts)}), keep_first=2)
    ranks = [ThresholdControl([0], False, CPU) for _ in parts]
    seen: list[torch.Tensor] = []
    for rank, part in zip(ranks, parts, strict=True):
        rank.update(step_of({0: part}), keep_first=2, reduce=lambda t: seen.append(t) or t)
    for rank, part in zip(ranks, parts, strict=True):
        rank.counts_RZ.zero_()
        rank.update(step_of({0: part}), keep_first=2, reduce=lambda t: sum(seen))
        assert torch.equal(rank.counts_RZ, alone.counts_RZ)
    again = ThresholdControl([0], False, CPU)
    again.load_state_dict(alone.state_dict())
    assert again.thresholds(0.4) == alone.thresholds(0.4)


def test_resolution() -> None:
    """A threshold lies at a bin's lower edge: never above the wanted quantile, at most one bin below it."""
    logits = torch.linspace(-1, 1, 4000)[None]
    control = ThresholdControl([0], False, CPU)
    control.update(step_of({0: logits}), keep_first=0)
    exact = logits.quantile(0.7).item()
    assert exact - BIN - 1e-3 <= torch.logit(control.thresholds(0.3)[0]).item() <= exact + 1e-3
