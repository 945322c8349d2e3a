"""A gate a KV head: conversion, decisions, what is refused, saving, training, `generate`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import modlab
from modlab.cache.heads import HeadsLayer
from modlab.cache.recent import RecentLayer
from modlab.cache.stored import keep_ratio_for
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.hf.names import cache_argument, given_cache
from modlab.measure import evaluate
from modlab.routing.router import HiddenRouter, Router
from modlab.routing.state import masked_execution
from modlab.routing.table import RoutingTable
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
        cache = given_cache(model(IDS, use_cache=True))
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
        cache: Any = given_cache(model(IDS, use_cache=True))
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
    for units in (-1, 2**31 - 1):
        with pytest.raises(ModlabError, match="0 to 65,536 units"):
            modlab.MoDConfig(router_hidden=units)
    with pytest.raises(ModlabError, match="a rank up to 65,536"):
        modlab.MoDConfig(skip="prompt", leave_rank=2**30)
    with pytest.raises(ModlabError, match="whole numbers"):
        modlab.MoDConfig(router_hidden=1.5)


def generated(model: Any, ids: torch.Tensor = IDS, **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    made: torch.Tensor = model.generate(ids, **settings)
    return made


def test_beams_read_what_their_rows_hold(make_llama) -> None:
    """The best of several beams scores what the model says of it in one forward."""
    model = converted(make_llama())
    out: Any = generated(
        model, num_beams=3, return_dict_in_generate=True, output_scores=True, length_penalty=0.0
    )
    made, T = out.sequences, IDS.shape[1]
    with torch.no_grad(), masked_execution(model):
        logits = model(made, use_cache=False).logits.log_softmax(-1)
    scores = logits[:, T - 1 : -1].gather(-1, made[:, T:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-3, atol=1e-3)


def test_a_padded_row_generates_as_it_would_alone(make_llama) -> None:
    model = converted(make_llama())
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :17], mask[1, :17] = 0, 0
    together = generated(model, ids, attention_mask=mask)
    alone = generated(model, IDS[1:, 17:])
    assert torch.equal(together[1, 17:], alone[0])


@torch.no_grad()
def test_a_cache_is_cropped_repeated_and_selected_by_row(make_llama) -> None:
    model = converted(make_llama())
    name = cache_argument(model)
    with modlab.routing_override(model, lambda layer, gate, at: torch.ones_like(gate, dtype=torch.bool)):
        cache = given_cache(model(IDS, use_cache=True))
        cache.crop(-9)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        got = model(IDS.flip(0)[:, 31:], use_cache=True, **{name: cache}).logits
        want = model(IDS.flip(0), use_cache=False).logits[:, 31:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    cache = given_cache(model(IDS, use_cache=True))
    with pytest.raises(ModlabError, match="cannot be cropped"):
        cache.crop(-9)
    copied = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    got = model(IDS[[1, 1], :1], use_cache=True, **{name: cache}).logits
    want = model(IDS[:, :1], use_cache=True, **{name: copied}).logits[1]
    torch.testing.assert_close(got, want.expand_as(got), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_documents_of_a_row_are_told_apart(make_llama) -> None:
    model = converted(make_llama())
    positions = torch.arange(40) - torch.where(torch.arange(40) < 25, 0, 25)
    together = model(IDS[:1], position_ids=positions[None], use_cache=False).logits
    alone = model(IDS[:1, 25:], use_cache=False).logits
    torch.testing.assert_close(together[:, 25:], alone, rtol=1e-4, atol=2e-5)


def test_it_is_traced_measured_and_calibrated(make_llama, word_tokenizer) -> None:
    model = converted(make_llama(), hidden=3)
    L, G = model.config.num_hidden_layers, model.config.num_key_value_heads
    trace = modlab.trace(model, word_tokenizer, " ".join(f"w{i}" for i in range(3, 60)))
    assert trace.layers == [layer for layer in range(L) for _ in range(G)]
    with torch.no_grad():
        cache = given_cache(model(torch.tensor([trace.token_ids.tolist()]), use_cache=True))
    notes = 1 + 5 / (2 * 4 * model.config.head_dim)
    assert trace.kv_saving == pytest.approx(notes * cache.dense_nbytes / cache.nbytes)
    reached = modlab.calibrate(model, [{"input_ids": IDS}], keep_ratio=0.4, tolerance=0.03)
    found = evaluate(model, [{"input_ids": IDS}])
    assert found.keep_ratio == pytest.approx(reached.keep_ratio) == pytest.approx(0.4, abs=0.03)
    table = modlab.sweep(model, None, [{"input_ids": IDS}], [0.0, 0.5], repeats=0, progress=False)
    assert table.kv_bytes[0] > table.kv_bytes[1] > 0 and table.kv_saving[1] > table.kv_saving[0]


def test_a_budget_is_what_the_cache_then_takes(make_llama) -> None:
    model = converted(make_llama(), keep_recent=2)
    ids = torch.randint(3, 100, (1, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mib = given_cache(model(ids, use_cache=True)).nbytes / 2**20
    with modlab.record_routing(model) as recording, torch.no_grad():
        model(ids, use_cache=False)
    keep = torch.stack([keep.float().mean() for keep in recording.steps[0].keep.values()]).mean()
    ratio = keep_ratio_for(model, kv_mib=mib, context=120)
    assert ratio == pytest.approx(float(keep), abs=0.02)


def test_a_table_of_decisions_may_be_by_head(make_llama) -> None:
    model = converted(make_llama())
    G = model.config.num_key_value_heads
    wanted = torch.rand(2, 40, G, generator=torch.Generator().manual_seed(3)) < 0.4
    table = RoutingTable(dict.fromkeys(model.mod.layers, wanted))
    with torch.no_grad(), modlab.routing_override(model, table), modlab.record_routing(model) as recording:
        model(IDS, use_cache=True)
    assert all(torch.equal(keep, wanted) for keep in recording.steps[0].keep.values())
