"""What is known of routers, and of their base, ends where they learn, in whatever loop that is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.routing.router import is_router
from modlab.routing.trained import Trained
from tests.helpers.models import routed_llama

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
KNOWN = Trained(savings={2.0: 0.4, 4.0: 0.6})
FORGOTTEN = pytest.warns(UserWarning, match="learn in a loop that is not modlab.train's")


@pytest.fixture
def model() -> Any:
    """A model whose routers know thresholds by saving, on a base that has a name."""
    model = routed_llama(skip="kv", keep_recent=4)
    model.mod.trained, model.mod.source, model.mod_base_model = KNOWN, "somewhere", "somebody/base"
    return model


ORDERS = ["step at once", "reference first", "evaluation first"]


def looks(model: Any, training: bool) -> None:
    """A forward that teaches nothing: of a reference in train mode, or an evaluation."""
    model.train(training)
    with torch.no_grad():
        model(IDS)
    model.train()


def learn(model: Any, steps: int, of: Any = lambda name: True, order: str = ORDERS[0], **adamw: Any) -> None:
    """A training loop as users write it."""
    learns = [parameter.requires_grad_(of(name)) for name, parameter in model.named_parameters()]
    optimizer = torch.optim.AdamW([p for p in learns if p.requires_grad], lr=1e-3, weight_decay=0.0, **adamw)
    model.train()
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        if order == "reference first":
            looks(model, training=True)
        loss.backward()
        if order == "evaluation first":
            looks(model, training=False)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adamw", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_thresholds_by_saving_are_not_those_of_other_routers(
    model: Any, adamw: dict[str, bool], order: str
) -> None:
    with FORGOTTEN:
        learn(model, 2, is_router, order, **adamw)
    assert model.mod.trained is None and model.mod.source == ""
    with pytest.raises(ModlabError, match="know no thresholds by KV saving"):
        modlab.set_kv_saving(model, 2)
    assert not model.mod.base_trained


def test_a_forward_after_the_last_step_is_enough(model: Any) -> None:
    learn(model, 1)
    assert model.mod.trained is KNOWN
    with FORGOTTEN, torch.no_grad():
        model(IDS)
    assert model.mod.trained is None and model.mod.base_trained


@pytest.mark.parametrize("order", ORDERS)
def test_what_does_not_learn_is_still_known(model: Any, order: str) -> None:
    """A base that learns alone is another one: routers by themselves are not the whole of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(model, 3, lambda name: not is_router(name), order)
        modlab.set_kv_saving(model, 2)
    assert model.mod.trained is KNOWN and model.mod.base_trained


@pytest.mark.parametrize("order", ORDERS)
def test_routers_alone_are_refused_once_the_base_has_learnt(model: Any, tmp_path: Path, order: str) -> None:
    modlab.save_routers(copy.deepcopy(model), tmp_path / "before")
    with FORGOTTEN:
        learn(model, 2, order=order)
    with pytest.raises(ModlabError, match="other weights than the routers"):
        modlab.save_routers(model, tmp_path / "after")


def test_gradients_without_a_step_change_nothing(model: Any) -> None:
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
        twin = copy.deepcopy(model)
        twin(IDS, labels=IDS).loss.backward()
    for one in (model, twin):
        assert one.mod.trained == KNOWN and one.mod.source and not one.mod.base_trained


def test_what_is_written_of_other_routers_is_about_those(model: Any) -> None:
    """Routers that are fitted or loaded after a forward in training have not learned in a loop."""
    model.train()
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_router(name):
                parameter.add_(1.0)
    model.mod.trained = others = Trained(savings={2.0: 0.3, 4.0: 0.5})
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(IDS)
    assert model.mod.trained is others and not model.mod.base_trained


def test_a_step_is_told_of_once(model: Any) -> None:
    """Thresholds that were found after it are about the routers that it made."""
    learn(model, 1)
    with FORGOTTEN:
        looks(model, training=False)
    model.mod.trained = KNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looks(model, training=False)
    assert model.mod.trained is KNOWN


def test_another_type_is_no_step(model: Any) -> None:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.to(torch.bfloat16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
    assert model.mod.trained is KNOWN and not model.mod.base_trained


def test_adapters_are_no_part_of_the_base(model: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    learn(adapted, 3, lambda name: "lora_" in name)
    assert model.mod.trained is KNOWN and not model.mod.base_trained
