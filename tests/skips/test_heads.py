"""A gate a KV head: conversion, decisions, what is refused, saving, training, `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.cache.heads import HeadsLayer
from modlab.cache.recent import RecentLayer
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.routing.router import HiddenRouter, Router
from modlab.routing.state import masked_execution
from tests.helpers.tokenizers import make_tokenizer

IDS = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))


def converted(model: Any, hidden: int = 0, **changes: Any) -> Any:
    """With routers that say something else of each token and head."""
    settings = {"layers": "all", "gates": "kv_head", "keep_first": 2, "keep_recent": 4, **changes}
    model = modlab.convert(model, modlab.MoDConfig(router_hidden=hidden, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mod_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("hidden", [0, 5])
def test_conversion_changes_no_logit_and_is_undone(make_llama, hidden: int) -> None:
    model = make_llama()
    want, G = model(IDS).logits, model.config.num_key_value_heads
    modlab.convert(
        model, modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=hidden, keep_recent=4)
    )
    router = model.model.layers[0].mod_router
    assert type(router) is (HiddenRouter if hidden else Router) and router.weight.shape[0] == G > 1
    assert set(model.mod.gates.values()) == {G}
    assert torch.equal(model(IDS).logits, want)
    modlab.revert(model)
    assert torch.equal(model(IDS).logits, want)


def test_the_default_router_is_linear_and_one_a_layer(make_llama) -> None:
    model = modlab.convert(make_llama())
    assert set(model.mod.gates.values()) == {1}
    assert type(model.model.layers[2].mod_router) is Router


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_decisions_are_by_head_and_every_way_of_running_agrees(make_llama, name: str) -> None:
    model = converted(make_llama(), hidden=3)
    model.set_attn_implementation(name)
    G = model.config.num_key_value_heads
    with torch.no_grad(), modlab.record_routing(model) as recording:
        with masked_execution(model):
            want = model(IDS, use_cache=False).logits
        got = model(IDS, use_cache=True).logits
    keep = recording.steps[0].keep[1]
    assert keep.shape == (*IDS.shape, G) and not torch.equal(keep[..., 0], keep[..., 1])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_each_head_is_stored_as_long_as_it_keeps(make_llama) -> None:
    model = converted(make_llama())
    with torch.no_grad(), modlab.record_routing(model) as recording:
        cache = modlab.hf.names.given_cache(model(IDS, use_cache=True))
    G = model.config.num_key_value_heads
    for layer, keep_BTG in recording.steps[0].keep.items():
        stored: Any = cache.layers[layer]
        alive = keep_BTG.clone()
        alive[:, -3:] = True
        assert isinstance(stored, HeadsLayer)
        assert stored.lengths == alive.sum(1).flatten().tolist()
        assert stored.keys.shape[:2] == (1, sum(stored.lengths)), "no place but those of stored keys"
        assert cache.kept_tokens[layer].tolist() == [-(-int(n) // G) for n in alive.sum((1, 2))]
    size = 2 * 4 * model.config.head_dim
    keys = sum(sum(layer.lengths) for layer in cache.layers)
    assert cache.nbytes == keys * (size + 5)
    assert cache.dense_nbytes == IDS.numel() * G * size * model.config.num_hidden_layers


def test_it_generates_as_it_reads(make_llama) -> None:
    model = converted(make_llama(), hidden=3)
    made = model.generate(IDS, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad(), masked_execution(model):
        logits = model(made, use_cache=False).logits
    assert torch.equal(logits[:, IDS.shape[1] - 1 : -1].argmax(-1), made[:, IDS.shape[1] :])


@pytest.mark.parametrize("hidden", [0, 3])
def test_fast_generation_says_that_it_has_no_form_yet(make_llama, hidden: int) -> None:
    gates = "layer" if hidden else "kv_head"
    model = converted(make_llama(), hidden=hidden, gates=gates)
    want = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    with pytest.warns(UserWarning, match="without the engine"):
        modlab.enable_fast_generation(model)
    got = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    last = modlab.fast_generation_report(model)["last"]
    assert torch.equal(got, want) and not last["fast"]
    assert ("router_hidden" if hidden else "kv_head") in last["why"]


def test_what_if_passes_teach_each_head_on_its_own(make_llama) -> None:
    model = converted(make_llama(), hidden=3).train()
    with torch.no_grad():  # heads see no gradient where noise has closed all of their gates
        for layer in model.model.layers:
            layer.mod_router.weight.mul_(0.1)
    model(IDS, labels=IDS).loss.backward()
    for layer in model.model.layers:
        grads = {name: p.grad for name, p in layer.mod_router.named_parameters()}
        assert set(grads) == {"weight", "bias", "into", "out"}
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
        assert (grads["weight"].abs().sum(1) > 0).all(), "every head"


@pytest.mark.parametrize("hidden", [0, 5])
def test_it_is_saved_and_loaded(make_llama, hidden: int, tmp_path) -> None:
    model = converted(make_llama(), hidden=hidden)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    again, _ = modlab.load(tmp_path / "model")
    assert again.mod.config == model.mod.config and again.mod.gates == model.mod.gates
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_one_kv_head_has_one_gate() -> None:
    model = converted(tiny_model("gpt_bigcode"))
    assert set(model.mod.gates.values()) == {1}
    with torch.no_grad(), modlab.record_routing(model) as recording:
        cache: Any = modlab.hf.names.given_cache(model(IDS, use_cache=True))
    assert recording.steps[0].keep[0].shape == IDS.shape
    assert isinstance(cache.layers[0], RecentLayer) and not isinstance(cache.layers[0], HeadsLayer)


def test_a_latent_has_no_heads() -> None:
    with pytest.raises(ModlabError, match="one latent for all heads"):
        converted(tiny_model("deepseek_v3"))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ModlabError, match="KV heads apart can only be dropped from the cache"):
        modlab.MoDConfig(skip="layer", gates="kv_head")
    with pytest.raises(ModlabError, match="choose one of layer, kv_head"):
        modlab.MoDConfig(gates="head")
    with pytest.raises(ModlabError, match="0 or more units"):
        modlab.MoDConfig(router_hidden=-1)
    with pytest.raises(ModlabError, match="whole numbers"):
        modlab.MoDConfig(router_hidden=1.5)
