"""The noise of what-if passes: uniform, and a row's own wherever the row is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.routing.noise import Noise
from tests.helpers.models import scatter_gates

REAL = torch.ones(256, 512, dtype=torch.bool)


def draws(seed: int = 0, step: int = 3, layer: int = 2, gates: int = 1) -> torch.Tensor:
    return Noise(seed, step, torch.arange(len(REAL))).uniform(layer, REAL, gates)


def test_draws_are_uniform_and_tell_nothing_of_each_other() -> None:
    u = draws()[..., 0]
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - counts.mean()).square() / counts.mean()).sum() < 120  # chi square, 63 degrees: 1e-5
    centred = u - 0.5
    others = [draws(seed=1), draws(step=4), draws(layer=3), draws(gates=2)[..., 1:]]
    for other in [centred[1:], *(o[..., 0] - 0.5 for o in others)]:
        assert abs((centred[: len(other)] * other).mean().item() * 12) < 0.015
    assert abs((centred[:, 1:] * centred[:, :-1]).mean().item() * 12) < 0.015


def test_a_row_has_its_noise_in_any_batch_and_with_any_padding() -> None:
    whole = draws()
    part = Noise(0, 3, torch.tensor([7, 200])).uniform(2, REAL[:2])
    assert torch.equal(part, whole[[7, 200]])
    real = torch.tensor([[0, 0, 1, 1, 0, 1]]).bool()
    padded = Noise(0, 3, torch.tensor([7])).uniform(2, real)
    assert torch.equal(padded[real], whole[7:8, :3].flatten(0, 1))


@pytest.mark.parametrize("given", [True, False])
def test_a_what_if_pass_draws_what_it_is_given(make_llama: Any, given: bool) -> None:
    """Twice the same with the same `Noise`, and in each row the same as with the row alone."""
    model = modlab.convert(make_llama(), modlab.MoDConfig(keep_recent=3)).train()
    scatter_gates(model)
    ids = torch.randint(3, 500, (3, 24), generator=torch.Generator().manual_seed(0))

    def logits(rows: list[int]) -> torch.Tensor:
        model.mod.noise = Noise(5, 1, torch.tensor(rows)) if given else None
        with torch.no_grad():
            return model(ids[rows], use_cache=False).logits

    whole = logits([0, 1, 2])
    assert torch.equal(whole, logits([0, 1, 2])) == given
    assert torch.allclose(whole[1:2], logits([1]), atol=1e-5) == given


def test_a_recomputed_layer_draws_again_what_it_drew(make_llama: Any) -> None:
    """With gradient checkpointing, and without torch's generator being put back."""
    grads = []
    for recomputed in (False, True):
        model = modlab.convert(make_llama(), modlab.MoDConfig(keep_recent=3)).train()
        scatter_gates(model)
        if recomputed:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "preserve_rng_state": False})
        model.mod.noise = Noise(5, 1, torch.arange(2))
        ids = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for name, p in model.named_parameters() if "mod_router" in name])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)
