"""Objectives: the gradient that is written down, the thresholds of `spread`, a run that learns."""

from __future__ import annotations

import pytest
import torch

from benchmarks.real_models.base import Base
from benchmarks.real_models.distil import Curve, Plan, distil
from benchmarks.real_models.divergence import kl_with_slope
from benchmarks.real_models.gates import GateForm, Gates
from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.texts import Data


def test_the_slope_is_the_gradient_of_kl() -> None:
    torch.manual_seed(0)
    teacher, head = torch.randn(2, 5, 8), torch.randn(11, 8)
    student = torch.randn(2, 5, 8, requires_grad=True)
    share = torch.tensor([0.3, 0.7])
    kl, slope = kl_with_slope(student.detach(), teacher, head, share)
    log_s, log_t = ((x @ head.T).log_softmax(-1) for x in (student, teacher))
    right = (log_t.exp() * (log_t - log_s)).sum(-1)
    torch.testing.assert_close(kl, right.detach())
    (right.mean(1) * share).sum().backward()
    torch.testing.assert_close(slope, student.grad)


def test_thresholds_give_the_expected_share() -> None:
    curve = Curve(torch.randn(5000) * 4)
    share = torch.tensor([0.5, 0.1, 0.03])
    found = torch.sigmoid(curve.values[:, None] - curve.shifts(share)).mean(0)
    torch.testing.assert_close(found, share, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["anneal", "spread", "mixed"])
def test_a_run_leaves_gates_that_differ_by_token(base: Base, data: Data, objective: str) -> None:
    torch.manual_seed(0)
    gates = Gates(base.shape, GateForm(hidden=4))
    for layer in gates.layers:
        layer.linear.data.normal_(std=0.3)
    before = [layer.linear.detach().clone() for layer in gates.layers]
    mixture = Mixture(data.stream, data.lines)
    plan = Plan(
        tokens=12 * 512, batch=512, length=256, long=512, objective=objective, ratio=4, window=16, rate=0.02
    )
    said: list[str] = []
    found = distil(base, gates, mixture, plan, said.append)
    assert found["tokens"] == 12 * 512 and found["history"][-1]["step"] == 12
    assert not any(torch.equal(layer.linear, old) for layer, old in zip(gates.layers, before, strict=True))
    if objective != "spread":
        assert found["history"][-1]["open"] < found["history"][0]["open"]
