"""`generate` while a model is in train mode, as reinforcement learning calls it: with a cache the packed path
runs, and decides as it does in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from tests.helpers.models import scatter_gates

IDS = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
FORMS = [{"skip": skip} for skip in ("kv", "layer", "attention", "mlp")] + [
    {"skip": "layer", "operator": "topk", "gate": "fused"},
    {"skip": "layer", "gate": "paper"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("what_if", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_same_tokens_come_in_train_mode(
    make_llama: Any, form: dict[str, str], what_if: bool, checkpointing: bool
) -> None:
    model = modlab.convert(make_llama(), modlab.MoDConfig(layers=[1, 3], keep_recent=3, keep_first=1, **form))
    scatter_gates(model)
    call = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS, **call, eos_token_id=None)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.mod.what_if = what_if
    got = model.generate(IDS, **call, eos_token_id=None, use_cache=True)
    assert torch.equal(got, want) and model.training
    assert torch.equal(model.generate(IDS, **call, eos_token_id=None, num_beams=1), want)
    without = model.generate(IDS, **call, eos_token_id=None, use_cache=False)  # as Trainer leaves the config
    assert torch.equal(without, want)


def test_a_forward_that_would_lose_its_cache_is_refused(make_llama: Any) -> None:
    model = modlab.convert(make_llama(), modlab.MoDConfig(layers=[1, 3], keep_recent=3))
    cache = model(IDS[:, :8], use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(modlab.ModlabError, match="drops the cache"):
        model(IDS[:, 8:], past_key_values=cache)
    assert model(IDS, use_cache=True).logits.requires_grad, "a training forward needs no cache"


def test_a_what_if_pass_comes_back_after_a_generation_that_failed(make_llama: Any) -> None:
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip="kv", layers="all", keep_recent=3)).train()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(IDS, max_new_tokens=0)
    assert not model.mod.of_thread.generates
    first, second = model(IDS).logits, model(IDS).logits
    assert not torch.equal(first, second), "a training forward draws noise"


def test_a_training_step_follows_a_generation(make_llama: Any) -> None:
    model = modlab.convert(make_llama(), modlab.MoDConfig(layers="all", keep_recent=3)).train()
    for _ in range(2):
        rows = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
        model(rows, labels=rows).loss.backward()
    assert model.model.layers[1].mod_router.weight.grad.abs().sum() > 0
