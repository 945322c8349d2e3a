"""What gates say, and what becomes of them on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.real_models import pack
from benchmarks.real_models.base import Base
from benchmarks.real_models.gates import (
    GONE,
    GateForm,
    Gates,
    gate_values,
    hard_log_weights,
    mean_of_next,
    soft_log_weights,
)


def test_the_mean_of_the_next_tokens_sees_no_other() -> None:
    x = torch.randn(2, 12, 3)
    mean = mean_of_next(x, 4)
    torch.testing.assert_close(mean[:, 2], x[:, 3:7].mean(1))
    torch.testing.assert_close(mean[:, 10], x[:, 11:].sum(1) / 4)
    torch.testing.assert_close(mean[:, 11], torch.zeros(2, 3))


def test_first_tokens_are_always_kept() -> None:
    form = GateForm(first=2)
    closed = torch.full((1, 1, 5), -50.0)
    assert (soft_log_weights(closed, torch.rand(1, 1, 5), form)[0, 0] == 0).tolist() == [True, True] + 3 * [
        False
    ]
    assert hard_log_weights(closed > 0, form)[0, 0].tolist() == [0.0, 0.0] + 3 * [GONE]


def test_noise_keeps_a_gate_as_often_as_its_sigmoid_says() -> None:
    form = GateForm(first=0)
    z = torch.full((1, 1, 20_000), 1.0)
    kept = (
        (soft_log_weights(z, torch.rand_like(z), form) > -0.7).float().mean()
    )  # log 1/2: more open than not
    assert abs(kept - torch.sigmoid(torch.tensor(1.0))) < 0.02


def test_saved_gates_say_the_same(base: Base, tmp_path: Path) -> None:
    gates = Gates(base.shape, GateForm(hidden=3, ahead=2))
    for weight in gates.parameters():
        weight.data = torch.randn_like(weight).half().float()
    assert gates.save(tmp_path / "gates.safetensors", {"data": "noise"}) < 20_000
    again = pack.load(tmp_path / "gates.safetensors")
    x = torch.randn(1, 9, base.shape.D)
    assert again.form == gates.form
    torch.testing.assert_close(gate_values(x, again.of(1), 2), gate_values(x, gates.of(1), 2))
