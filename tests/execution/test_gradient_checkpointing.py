"""Gradient checkpointing recomputes a routed layer as its own forward ran it, whatever ran in between."""

from __future__ import annotations

import pytest
import torch

import modlab
from modlab.training import objectives
from tests.helpers.models import alternate_layers, scatter_gates

LONG = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
SHORT = torch.randint(3, 500, (3, 11), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(SHORT)
PADDED[0, :5] = 0  # left padding: other rows, other lengths, other positions than LONG


def switch(model, on: bool) -> None:
    """Gradient checkpointing on or off, under the name that this version of transformers has for it."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{prefix}_checkpointing"):
        getattr(model, f"{prefix}_checkpointing_disable")()


def gradients(model, checkpointing: bool, between=lambda: None) -> dict[str, torch.Tensor]:
    """Gradients of two forwards and one backward, with the two-sided keep ratio term of both."""
    switch(model, checkpointing)
    model.zero_grad()
    torch.manual_seed(0)  # what-if passes with skip="kv" toss coins
    with modlab.record_routing(model, detach=False) as recording:
        first = model(input_ids=LONG, labels=LONG).loss
        between()
        second = model(input_ids=SHORT, attention_mask=PADDED, labels=SHORT).loss
    terms = [objectives.target_objective(step, 0.3, lam=2.0) for step in recording.steps]
    (first + 2 * second + sum(terms)).backward()
    assert len(recording.steps) == 2, "a recompute is not another forward"
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("what_if", [True, False])
@pytest.mark.parametrize("skip", ["layer", "attention", "mlp", "kv"])
def test_two_forwards_before_one_backward(make_llama, skip: str, what_if: bool) -> None:
    model = modlab.convert(make_llama(), alternate_layers(skip=skip, keep_first=1, keep_recent=4)).train()
    scatter_gates(model)
    model.mod.what_if = what_if
    plain, recomputed = gradients(model, False), gradients(model, True)
    assert plain.keys() == recomputed.keys() and any("mod_router" in name for name in plain)
    for name, expected in plain.items():
        torch.testing.assert_close(recomputed[name], expected, msg=lambda m, n=name: f"{n}: {m}")


def test_what_changes_between_the_forwards_does_not_reach_back(make_llama) -> None:
    """Thresholds and what-if belong to the forward that ran with them, also in its recompute."""
    model = modlab.convert(make_llama(), alternate_layers(keep_first=1)).train()
    scatter_gates(model)

    def change() -> None:
        modlab.set_threshold(model, 0.7)
        model.mod.what_if = False

    def start() -> None:
        modlab.set_threshold(model, 0.4)
        model.mod.what_if = True

    start()
    plain = gradients(model, False, change)
    start()
    recomputed = gradients(model, True, change)
    for name, expected in plain.items():
        torch.testing.assert_close(recomputed[name], expected, msg=lambda m, n=name: f"{n}: {m}")
