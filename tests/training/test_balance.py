"""Mixtures of experts are trained on the loss that they have themselves, balancing included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import modlab
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.training.loop import TrainConfig, train
from modlab.training.model import balancing_loss

# a weight on the model, under another name, from a nested config; sinks; and one that only has the setting
TYPES = ("mixtral", "jetmoe", "dbrx", "gpt_oss", "zaya")
ROWS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


def mixture(model_type: str) -> Any:
    torch.manual_seed(0)
    model = tiny_model(model_type)
    model.config.get_text_config().output_router_logits = True
    return model


def gradient_of_training(model: Any, **settings: Any) -> tuple[dict[str, torch.Tensor], Any]:
    seen: dict[str, torch.Tensor] = {}

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(note)
    config = {"steps": 1, "max_grad_norm": 1e9, "mixed_precision": "no", "seed": 0, "calibrate": False}
    try:
        history = train(model, ROWS, TrainConfig(**(config | settings))).history
    finally:
        handle.remove()
    return seen, history.iloc[-1]


@pytest.mark.parametrize("model_type", TYPES)
def test_the_gradient_is_that_of_the_models_own_loss(model_type: str) -> None:
    model = mixture(model_type).train()
    torch.manual_seed(0)
    own = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found, row = gradient_of_training(model, batch_size=4)
    assert row["loss"] + row.get("balance", 0.0) == pytest.approx(own.item(), rel=1e-6)
    assert ("balance" in row) == (model_type != "zaya")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_a_converted_mixture_keeps_its_balancing() -> None:
    model = modlab.convert(mixture("mixtral"), modlab.MoDConfig(keep_recent=3))
    _, row = gradient_of_training(model, batch_size=2, grad_accum=2)
    weight = model.router_aux_loss_coef
    assert row["balance"] == pytest.approx(2 * weight, rel=0.2)  # 2 of its experts a token, nearly balanced
    model.config.output_router_logits = False
    assert "balance" not in gradient_of_training(model, batch_size=4)[1]


def test_a_weight_that_is_not_known_is_asked_for() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    output = SimpleNamespace(aux_loss=torch.ones(()))
    with pytest.raises(ModlabError, match="no router_aux_loss_coef.*output_router_logits=False"):
        balancing_loss(SimpleNamespace(config=config), output)
