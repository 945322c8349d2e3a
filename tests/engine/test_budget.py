"""A bound on what a generation stores: never more, the lowest gates go, what is within it is not touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.engine.budget import MIB, Budget, LayerBytes, layer_bytes
from modlab.engine.prefill import prefill, scratch_buffers
from modlab.engine.ring import RingBuffer
from modlab.errors import ModlabError
from tests.helpers.fast_generation import NEW, generated, llama_on_device, prompts, stepped, use_engine

RECENT = 4
"""`keep_recent` of these models."""

GATES = ["layer", "kv_head"]


def bounded(gates: str, **bounds: Any) -> Any:
    model = llama_on_device(skip="kv", gates=gates)
    return modlab.enable_fast_generation(model, compile=False, **bounds)


@pytest.mark.parametrize("gates", GATES)
def test_a_bound_that_is_not_met_changes_nothing(gates: str) -> None:
    inputs = prompts(30, 9)
    want = generated(llama_on_device(skip="kv", gates=gates), inputs, eos_token_id=None)
    assert generated(bounded(gates, kv_tokens=200), inputs, eos_token_id=None) == want
    assert generated(bounded(gates, kv_mib=64), inputs, eos_token_id=None) == want


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("tokens", [RECENT, RECENT + 1, 11, 20])
def test_no_row_stores_more_than_it_may(tokens: int, gates: str) -> None:
    model, inputs = bounded(gates, kv_tokens=tokens), prompts(30, 3, 12)
    generated(model, inputs, eos_token_id=None)
    last = modlab.fast_generation_report(model)["last"]
    stored = [last["kept_tokens"][i] for i in model.mod.layers]
    assert max(map(max, stored)) <= tokens
    assert tokens > 11 or max(map(max, stored)) == tokens, "the bound should have been met"
    free = modlab.enable_fast_generation(llama_on_device(skip="kv", gates=gates), compile=False)
    generated(free, inputs, eos_token_id=None)
    assert last["kv_bytes"] < modlab.fast_generation_report(free)["last"]["kv_bytes"]


@pytest.mark.parametrize("gates", GATES)
def test_a_prompt_leaves_its_best_tokens(gates: str) -> None:
    """Against a cache without a bound: the best older tokens of each row and head, in order."""
    model, inputs, most = llama_on_device(skip="kv", gates=gates), prompts(40, 25), 5
    caches = []
    for bound in (RECENT + most, 1000):
        engine = use_engine(model, kv_tokens=bound)
        with torch.no_grad():
            caches.append(prefill(engine, inputs["input_ids"], inputs["attention_mask"], bound - RECENT)[1])
        modlab.disable_fast_generation(model)
    for layer in model.mod.layers:
        cut, whole = (cache[layer] for cache in caches)
        assert isinstance(cut, RingBuffer) and isinstance(whole, RingBuffer)
        assert cut.scores is not None and whole.scores is not None and cut.keys is not None
        assert whole.keys is not None and cut.keys.shape[1] == sum(cut.capacities) <= len(cut.lengths) * (
            RECENT + most
        )
        assert max(whole.lengths) > RECENT + most, "something should go"
        for unit, (here, there) in enumerate(zip(cut.starts, whole.starts, strict=True)):
            scores = whole.scores[there + RECENT : there + whole.lengths[unit]]
            best = scores.topk(min(most, len(scores))).indices.sort().values
            places = torch.cat([torch.arange(RECENT, device=best.device), RECENT + best]) + there
            n = cut.lengths[unit]
            assert torch.equal(cut.keys[:, here : here + n], whole.keys[:, places])
            assert torch.equal(cut.scores[here + RECENT : here + n], scores[best])


@pytest.mark.parametrize("gates", GATES)
def test_decoding_goes_on_as_a_prompt_would_have(gates: str) -> None:
    """In the first routed layer, whose states no eviction has changed, the same tokens are left whether they
    came in the prompt or one by one."""
    model, inputs, bound = llama_on_device(skip="kv", gates=gates), prompts(60, 41), RECENT + 6
    engine, left = use_engine(model, kv_tokens=bound), []
    first = model.mod.layers[0]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for later in (0, 23):
        cache = stepped(engine, ids, mask, ids.shape[1] - later, bound - RECENT)[0][first]
        assert isinstance(cache, RingBuffer) and cache.scores is not None
        ends = zip(cache.starts, cache.lengths, strict=True)
        left.append([cache.scores[start + RECENT : start + n].sort().values for start, n in ends])
        engine.release()
    assert all(len(scores) == 6 for scores in left[0])
    for at_once, one_by_one in zip(*left, strict=True):
        torch.testing.assert_close(at_once, one_by_one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gates", GATES)
def test_first_tokens_go_last(gates: str) -> None:
    model = llama_on_device(skip="kv", gates=gates)
    modlab.set_threshold(model, 0.001)  # everything is kept, whatever its gate
    engine, inputs = use_engine(model, kv_tokens=RECENT + 4), prompts(30)
    with torch.no_grad():
        caches = prefill(engine, inputs["input_ids"], None, 4)[1]
    for layer in model.mod.layers:
        cache = caches[layer]
        assert isinstance(cache, RingBuffer) and cache.scores is not None
        for start, n in zip(cache.starts, cache.lengths, strict=True):
            assert cache.scores[start + RECENT : start + n].tolist() == [2.0] * 4


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mib", [0.25, 0.3, 0.6])
def test_bytes_stay_within_their_bound(mib: float, gates: str) -> None:
    model, inputs = bounded(gates, kv_mib=mib), prompts(60, 20)
    generated(model, inputs, eos_token_id=None)
    last = modlab.fast_generation_report(model)["last"]
    budget = model.__dict__["mod_engine"].budget
    older = budget.older(2, 60 + NEW)
    assert last["kv_bytes"] <= budget.needed(2, 60 + NEW, older) <= mib * MIB
    assert budget.needed(2, 60 + NEW, older + 1) > mib * MIB or older == 60 + NEW


def test_bounds_that_hold_nothing_are_refused_with_the_numbers() -> None:
    layers = (LayerBytes(1024, 0), LayerBytes(1024, 2))
    with pytest.raises(ModlabError, match=r"kv_tokens=3 is less than the latest 4 tokens"):
        Budget(3, None, 4, layers)
    with pytest.raises(ModlabError, match=r"kv_mib=0 has to be above 0"):
        Budget(None, 0, 4, layers)
    with pytest.raises(
        ModlabError, match=r"kv_mib=0.01 does not hold 2 row\(s\) of up to 100 tokens: .* take 0\.\d{3} MiB"
    ) as refused:
        Budget(None, 0.01, 4, layers).older(2, 100)
    enough = float(str(refused.value).split(" MiB")[0].split()[-1])
    assert Budget(None, enough, 4, layers).older(2, 100) >= 0
    with pytest.raises(ModlabError):
        Budget(None, enough - 0.001, 4, layers).older(2, 100)
    with pytest.raises(ModlabError, match="this model has none"):
        modlab.enable_fast_generation(llama_on_device(skip="layer"), kv_tokens=100)


def test_bytes_of_layers_are_those_of_their_buffers() -> None:
    for gates, heads in (("layer", 1), ("kv_head", 2)):
        engine = use_engine(llama_on_device(skip="kv", gates=gates))
        found = layer_bytes(scratch_buffers(engine, 1))
        assert {layer.token for layer in found} == {2 * 2 * 16 * 4}
        assert [layer.gates for layer in found] == [0, heads] * 3


def test_calls_that_the_engine_does_not_serve_are_refused_under_a_bound() -> None:
    model, inputs = bounded("layer", kv_tokens=20), prompts(9, 4)
    with pytest.raises(ModlabError, match="does not serve this call: it is beam search"):
        generated(model, inputs, num_beams=2)
    with pytest.raises(ModlabError, match="does not serve this call: return_dict_in_generate"):
        model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(ModlabError, match=r"KVTracker has one.*fast_generation_report\(model\)\['last'\]"):
        with modlab.KVTracker(model):
            generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model, inputs, num_beams=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "64", True, torch.tensor(64.0)])
def test_a_bound_is_a_number(value: Any) -> None:
    for wrong in ({"kv_tokens": value}, {"kv_mib": value}):
        with pytest.raises(ModlabError, match="give a "):
            modlab.enable_fast_generation(llama_on_device(skip="kv"), **wrong)


def test_a_refused_switch_leaves_the_engine_that_was_on() -> None:
    model, inputs = bounded("layer", kv_tokens=20), prompts(60, 20)
    engine, want = model.__dict__["mod_engine"], generated(model, inputs, eos_token_id=None)
    for wrong in ({"kv_tokens": 2}, {"kv_mib": 0}, {"kv_tokens": "20"}):
        with pytest.raises(ModlabError):
            modlab.enable_fast_generation(model, compile=False, **wrong)
        assert model.__dict__["mod_engine"] is engine
        assert generated(model, inputs, eos_token_id=None) == want
        assert modlab.fast_generation_report(model)["last"]["fast"]
    modlab.disable_fast_generation(model)
    with pytest.raises(ModlabError):
        modlab.enable_fast_generation(model, compile=False, kv_tokens=2)
    assert modlab.fast_generation_report(model) == {"enabled": False}
