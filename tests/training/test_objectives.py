"""Objectives against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.training import objectives
from tests.helpers.models import alternate_layers


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def recorded(
    logits: dict[int, list[list[float]]], keep: dict[int, list[list[int]]], real: list[list[int]]
) -> Any:
    """What a recording of one forward holds, with graph."""
    leaves = {layer: torch.tensor(rows, requires_grad=True) for layer, rows in logits.items()}
    return SimpleNamespace(
        logit=leaves,
        gate={layer: torch.sigmoid(leaf) for layer, leaf in leaves.items()},
        keep={layer: torch.tensor(rows).bool() for layer, rows in keep.items()},
        real=torch.tensor(real).bool(),
    )


@pytest.fixture
def step() -> Any:
    """Two routed layers, two rows; the last token of row 1 is padding with an extreme logit that must not
    count."""
    return recorded(
        logits={1: [[0.0, 1.0, -1.0], [2.0, -2.0, 50.0]], 3: [[1.0, 1.0, 1.0], [-1.0, -1.0, 50.0]]},
        keep={1: [[1, 1, 0], [1, 0, 1]], 3: [[1, 1, 1], [0, 0, 1]]},
        real=[[1, 1, 1], [1, 1, 0]],
    )


G1 = (0.5 + sigmoid(1) + sigmoid(-1) + sigmoid(2) + sigmoid(-2)) / 5
G3 = (3 * sigmoid(1) + 2 * sigmoid(-1)) / 5
F1, F3 = 3 / 5, 3 / 5


def test_ratios_and_means_leave_padding_out(step: Any) -> None:
    assert objectives.keep_ratios(step).tolist() == pytest.approx([F1, F3])
    assert objectives.gate_means(step).tolist() == pytest.approx([G1, G3])


def test_load_objective(step: Any) -> None:
    loss = objectives.load_objective(step, alpha=0.1)
    assert loss.item() == pytest.approx(0.1 * (F1 * G1 + F3 * G3))
    loss.backward()
    # d/dz of alpha * F * mean(sigmoid(z)) = alpha * F * g (1 - g) / 5: F itself carries no gradient
    assert step.logit[1].grad[0, 0].item() == pytest.approx(0.1 * F1 * 0.25 / 5)
    assert step.logit[3].grad[1, 2].item() == 0


def test_target_objective_is_two_sided(step: Any) -> None:
    for target, sign in ((0.25, 1), (0.9, -1)):
        step.logit[1].grad = None
        loss = objectives.target_objective(step, target, lam=2.0)
        assert loss.item() == pytest.approx(2 * ((F1 + F3) / 2 - target) ** 2)
        loss.backward(retain_graph=True)
        # 2 * lam * (ratio - target) * d mean gate: above the target gates are pushed down, below it up
        expected = 2 * 2 * ((F1 + F3) / 2 - target) * 0.25 / (5 * 2)
        assert step.logit[1].grad[0, 0].item() == pytest.approx(expected)
        assert math.copysign(1, expected) == sign


def test_target_per_layer_differs_from_the_mean() -> None:
    step = recorded({0: [[1.0, 1.0]], 1: [[1.0, 1.0]]}, {0: [[1, 1]], 1: [[0, 0]]}, [[1, 1]])
    assert objectives.target_objective(step, 0.5).item() == 0
    assert objectives.target_objective(step, 0.5, lam=3.0, per_layer=True).item() == pytest.approx(3 * 0.25)


def test_topk_bce(step: Any) -> None:
    def bce(logit: float, label: int) -> float:
        return -math.log(sigmoid(logit) if label else 1 - sigmoid(logit))

    one = (bce(0, 1) + bce(1, 1) + bce(-1, 0) + bce(2, 1) + bce(-2, 0)) / 5
    three = (3 * bce(1, 1) + 2 * bce(-1, 0)) / 5
    assert objectives.topk_bce(step).item() == pytest.approx((one + three) / 2)


def test_next_token_loss_shifts_and_ignores() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    labels[1, 2] = -100
    log_p = logits.log_softmax(-1)
    terms = [
        -log_p[b, t, labels[b, t + 1]].item() for b in range(2) for t in range(3) if labels[b, t + 1] != -100
    ]
    assert len(terms) == 5
    assert objectives.next_token_loss(logits, labels[:, 1:]).item() == pytest.approx(sum(terms) / 5, rel=1e-5)
    assert objectives.next_token_loss(logits, torch.full((2, 3), -100)).item() == 0


def test_kl_to_teacher_by_hand() -> None:
    student = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]]))
    teacher = (
        torch.log(torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.99, 0.01]]])) + 3
    )  # a shift changes nothing
    real = torch.tensor([[1, 1, 0]])
    expected = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5) + 0) / 2
    assert objectives.kl_to_teacher(student, teacher, real).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [7, 20, 10**9])
def test_chunks_change_neither_value_nor_gradient(chunk: int) -> None:
    torch.manual_seed(1)
    teacher, labels, real = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5)), torch.rand(3, 5) > 0.3
    results: list[list[Tensor]] = []
    for elements in (10**9, chunk):
        logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss = objectives.next_token_loss(logits, labels[:, 1:], chunk_elements=elements)
        divergence = objectives.kl_to_teacher(logits, teacher, real, chunk_elements=elements)
        (loss + divergence).backward()
        assert logits.grad is not None
        results.append([loss, divergence, logits.grad])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts)


def test_kl_chunks_keep_no_logits_alive() -> None:
    """What autograd keeps from a chunked KL is its inputs, not fp32 copies of them."""
    logits = torch.randn(4, 64, 512, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(4, 64, 512, dtype=torch.bfloat16)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objectives.kl_to_teacher(logits, teacher, torch.ones(4, 64), chunk_elements=512 * 16)
    assert max(saved, default=0) < 512 * 16


def test_objectives_reach_the_routers_of_a_real_model(make_llama: Callable[..., Any]) -> None:
    model = modlab.convert(make_llama(), alternate_layers(keep_first=1)).train()
    ids = torch.randint(3, 512, (2, 12))
    with modlab.record_routing(model, detach=False) as recording:
        model(input_ids=ids, use_cache=False)
    objectives.target_objective(recording.steps[-1], 0.25).backward()
    biases = [p.grad for n, p in model.named_parameters() if "router" in n and n.endswith("bias")]
    assert len(biases) == 3
    assert all(g is not None and g.item() > 0 for g in biases)  # descent closes the gates
