"""Mixtures of experts are trained on the loss that they have themselves, balancing included."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
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


def reads_its_config(model: Any) -> bool:
    """Whether a forward balances because its config says so; JetMoE's of transformers 5.17 does not."""
    parameter = inspect.signature(type(model).forward).parameters.get("output_router_logits")
    return parameter is not None and parameter.default is None


@pytest.mark.parametrize("model_type", TYPES)
def test_the_gradient_is_that_of_the_models_own_loss(model_type: str) -> None:
    model = mixture(model_type).train()
    torch.manual_seed(0)
    if model_type == "dbrx" and Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(AttributeError):  # transformers 5.17 does not collect its router logits
            model(input_ids=ROWS, labels=ROWS, use_cache=False)
        with pytest.raises(ModlabError, match="DbrxForCausalLM.*output_router_logits=False"):
            gradient_of_training(model, batch_size=4)
        return
    own = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found, row = gradient_of_training(model, batch_size=4)
    assert row["loss"] + row.get("balance", 0.0) == pytest.approx(own.item(), rel=1e-6)
    assert ("balance" in row) == (model_type != "zaya" and reads_its_config(model))
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


def test_a_loss_of_no_router_logits_is_refused() -> None:
    """The 0 that transformers returns where none were collected is no loss: nothing would be balanced."""
    with pytest.raises(ModlabError, match="no router logits.*output_router_logits=False"):
        balancing_loss(SimpleNamespace(), SimpleNamespace(aux_loss=0))
