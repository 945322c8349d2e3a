"""Keys and values in fewer bits, switched on and off: what is measured, left alone and refused."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import modlab
from modlab.cache.dtypes import RANGES
from modlab.cache.int8 import Int8Range
from modlab.cache.range import RANGE, range_of
from modlab.errors import ModlabError
from tests.helpers.models import (
    alternate_layers,
    dense_llama,
    leaving_llama,
    routed_llama,
    scatter_gates,
    tiny_config,
)

IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))


def converted(**fields: Any) -> Any:
    """Gates open, so that nothing but eight bits changes a logit."""
    return modlab.convert(dense_llama(), alternate_layers(skip="kv", keep_recent=4, **fields))


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, **arguments).logits
    return found


def test_conversion_measures_and_leaves_all_else_alone() -> None:
    dense = dense_llama().train()
    dense.model.layers[2].eval()
    modes = {name: module.training for name, module in dense.named_modules()}
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = modlab.convert(dense, alternate_layers(skip="kv", kv_cache_dtype="int8"))
    assert torch.equal(before, torch.get_rng_state())
    found = {name: module.training for name, module in model.named_modules()}
    assert {name: found[name] for name in modes} == modes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert model.mod.config.kv_cache_dtype == "int8" and sorted(model.mod.ranges) == [1, 3, 5]
    for index, layer in enumerate(model.model.layers):
        assert range_of(layer) is model.mod.ranges.get(index)
    modlab.revert(model)
    assert model.state_dict().keys() == state.keys() and not hasattr(model.model.layers[1], RANGE)


def test_what_is_measured_is_the_range_of_keys_and_values() -> None:
    dense = dense_llama()
    projection = dense.model.layers[1].self_attn.v_proj
    projection.weight.data[:16] *= 64.0
    model = modlab.convert(dense, alternate_layers(skip="kv", kv_cache_dtype="int8"))
    step = model.mod.ranges[1].value_step
    ratio = step[0].log2().mean() - step[1].log2().mean()
    assert step.shape == (2, 16) and 5 < ratio < 7


def test_a_short_context_is_measured_over_its_length() -> None:
    model = modlab.convert(dense_llama(max_position_embeddings=48), modlab.MoDConfig(kv_cache_dtype="int8"))
    assert model.mod.ranges


def test_there_and_back_is_the_same_to_the_bit() -> None:
    model = scatter_gates(converted(), 4.0)
    forms = ({"use_cache": False}, {"use_cache": True})
    before = [logits(model, **form) for form in forms]
    names = list(model.state_dict())
    modlab.set_kv_cache_dtype(model, "int8")
    rounded = [logits(model, **form) for form in forms]
    assert not torch.equal(before[0], rounded[0])
    ranges = model.mod.ranges
    modlab.set_kv_cache_dtype(model, "int8")
    assert model.mod.ranges is ranges, "measured once"
    modlab.set_kv_cache_dtype(model, "auto")
    assert model.mod.config.kv_cache_dtype == "auto" and list(model.state_dict()) == names
    assert all(map(torch.equal, before, (logits(model, **form) for form in forms)))
    modlab.set_kv_cache_dtype(model, "int8")
    assert all(map(torch.equal, rounded, (logits(model, **form) for form in forms)))


def test_from_one_type_to_another_nothing_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scatter_gates(converted(), 4.0)
    found = {}
    for dtype in RANGES:  # each by itself
        modlab.set_kv_cache_dtype(model, "auto")
        modlab.set_kv_cache_dtype(model, dtype)
        found[dtype] = logits(model)
    assert not torch.equal(*found.values())
    names = list(model.state_dict())
    monkeypatch.setattr("modlab.conversion.ranges._measured", lambda *_: pytest.fail("measured again"))
    for dtype in (*RANGES, *RANGES):
        modlab.set_kv_cache_dtype(model, dtype)
        assert model.mod.config.kv_cache_dtype == dtype
        assert all(isinstance(one, RANGES[dtype]) for one in model.mod.ranges.values())
        assert all(range_of(model.model.layers[i]) is one for i, one in model.mod.ranges.items())
        assert torch.equal(logits(model), found[dtype]) and list(model.state_dict()) == names
    modlab.revert(model)
    assert not any(".mod_" in name for name in model.state_dict())


def test_heads_that_cannot_be_packed_are_refused_and_nothing_is_changed() -> None:
    model = modlab.convert(dense_llama(head_dim=18), alternate_layers(skip="kv", keep_recent=4))
    with pytest.raises(ModlabError, match="heads of 18 and 18 do not divide so: use 'int8'"):
        modlab.set_kv_cache_dtype(model, "k6v4")
    assert model.mod.config.kv_cache_dtype == "auto" and not model.mod.ranges
    modlab.set_kv_cache_dtype(model, "int8")
    before = model.mod.ranges
    with pytest.raises(ModlabError, match="use 'int8'"):
        modlab.set_kv_cache_dtype(model, "k6v4")
    assert model.mod.ranges is before and model.mod.config.kv_cache_dtype == "int8"


@pytest.mark.parametrize("stored_as", RANGES)
@torch.no_grad()
def test_nothing_is_rounded_in_training_or_with_routing_off(stored_as: str) -> None:
    model = converted(kv_cache_dtype=stored_as)
    dense = dense_llama()(IDS).logits
    assert not torch.equal(logits(model), dense)
    for use_cache in (True, False):
        with modlab.routing_off(model):
            assert torch.equal(logits(model, use_cache=use_cache), dense)
    model.mod.what_if = False
    assert torch.equal(model.train()(IDS).logits, dense)
    model.eval()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("stored_as", RANGES)
@torch.no_grad()
def test_generation_in_train_mode_is_that_in_eval_mode(use_cache: bool, stored_as: str) -> None:
    model = scatter_gates(converted(kv_cache_dtype=stored_as), 4.0).double()
    said = [
        m.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        for m in (model.eval(), model.train())
    ]
    assert torch.equal(*said)


def test_gradients_pass_in_eval_mode_without_a_cache() -> None:
    rounded, plain = (converted(kv_cache_dtype=dtype) for dtype in ("int8", "auto"))
    found = []
    for model in (rounded, plain):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(model.model.layers[1].self_attn.k_proj.weight.grad.flatten())
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("stored_as", RANGES)
def test_copies_and_types(stored_as: str) -> None:
    model = converted(kv_cache_dtype=stored_as)
    twin = copy.deepcopy(model)
    assert twin.mod.ranges[1] is twin.model.layers[1].mod_int8_range is not model.mod.ranges[1]
    again = pickle.loads(pickle.dumps(model))
    assert again.mod.ranges[1] is again.model.layers[1].mod_int8_range
    assert torch.equal(logits(model), logits(twin)) and torch.equal(logits(model), logits(again))
    twin.to(torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in twin.mod.ranges[1].buffers())
    assert torch.isfinite(logits(twin, use_cache=True).float()).all()


@torch.no_grad()
def test_a_cache_of_another_dtype_is_refused() -> None:
    model = converted()
    for dtype in ("int8", "k6v4", "auto"):
        cache = model(IDS, use_cache=True).past_key_values
        modlab.set_kv_cache_dtype(model, dtype)
        with pytest.raises(ModlabError, match="kv_cache_dtype"):
            model(IDS[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_generation_under_way_ends_as_it_began() -> None:
    from transformers import StoppingCriteriaList

    model = converted(kv_cache_dtype="int8").double()
    want = model.generate(IDS, max_new_tokens=10, do_sample=False)
    done = []

    def turn_off(ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not done:
            other = threading.Thread(target=modlab.set_kv_cache_dtype, args=(model, "auto"))
            other.start()
            other.join()
            done.append(True)
        return torch.zeros(len(ids), dtype=torch.bool)

    said = model.generate(
        IDS, max_new_tokens=10, do_sample=False, stopping_criteria=StoppingCriteriaList([turn_off])
    )
    assert torch.equal(said, want) and not model.mod.ranges


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("dtype", "other"), [("auto", "int8"), ("int8", "auto"), ("int8", "k6v4")])
def test_a_forward_under_way_ends_as_it_began(dtype: Any, other: Any, use_cache: bool) -> None:
    """Another thread sets the dtype between two layers."""
    model = converted(kv_cache_dtype=dtype)
    want = logits(model, use_cache=use_cache)

    def set_other(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=modlab.set_kv_cache_dtype, args=(model, other))
        thread.start()
        thread.join()

    handle = model.model.layers[2].register_forward_pre_hook(set_other)
    assert torch.equal(logits(model, use_cache=use_cache), want)
    assert model.mod.config.kv_cache_dtype == other


def test_recent_tokens_and_dtype_are_set_one_after_the_other() -> None:
    model = converted()
    modlab.set_kv_cache_dtype(model, "int8")
    modlab.set_keep_recent(model, 9)
    assert (model.mod.config.kv_cache_dtype, model.mod.config.keep_recent) == ("int8", 9)
    modlab.set_kv_cache_dtype(model, "auto")
    assert (model.mod.config.kv_cache_dtype, model.mod.config.keep_recent) == ("auto", 9)


def test_recordings_and_overrides_do_not_see_the_measuring() -> None:
    model = converted()
    with (
        modlab.record_routing(model) as recording,
        modlab.routing_override(model, lambda layer, gate, at: torch.zeros_like(gate).bool()),
    ):
        modlab.set_kv_cache_dtype(model, "int8")
        assert not recording.steps
        logits(model)
    assert not recording.steps[0].keep[1].any()


def test_above_the_point_of_leaving_the_trained_projections_are_measured() -> None:
    model = leaving_llama(by=0.5)
    modlab.set_kv_cache_dtype(model, "int8")
    first = model.mod.first_left
    layer = model.model.layers[first].self_attn
    base = Int8Range(2, 16, 16)
    with torch.no_grad(), modlab.routing_off(model):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(512, (16, 32), generator=generator)
        starts = torch.randint(2048 - 31, (16, 1), generator=generator)
        cache = model(ids, position_ids=starts + torch.arange(32)).past_key_values
    base.measure(cache.layers[first].keys, cache.layers[first].values)
    assert layer is not None and not torch.equal(base.value_step, model.mod.ranges[first].value_step)
    torch.testing.assert_close(
        model.mod.ranges[0].key_shift, _measured(cache, 0).key_shift, rtol=1e-4, atol=1e-5
    )


def _measured(cache: Any, layer: int) -> Int8Range:
    found = Int8Range(2, 16, 16)
    found.measure(cache.layers[layer].keys, cache.layers[layer].values)
    return found


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModlabError, match="choose one of auto, int8, k6v4"):
        modlab.set_kv_cache_dtype(converted(), "fp8")
    with pytest.raises(ModlabError, match="only with skip='kv' or 'kv\\+prompt'"):
        modlab.MoDConfig(skip="layer", kv_cache_dtype="int8")
    with pytest.raises(ModlabError, match="only with skip='kv' or 'kv\\+prompt'"):
        modlab.set_kv_cache_dtype(routed_llama(), "int8")
    with pytest.raises(ModlabError, match="is dense"):
        modlab.set_kv_cache_dtype(dense_llama(), "int8")
    broken = dense_llama()
    broken.model.layers[3].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModlabError, match="layer 5 are NaN"):
        modlab.convert(broken, alternate_layers(skip="kv", kv_cache_dtype="int8"))
    assert not modlab.is_converted(broken) and not any(".mod_" in name for name in broken.state_dict())
    monkeypatch.setattr("modlab.conversion.ranges.mesh_of", lambda model: object())
    whole = dense_llama()
    with pytest.raises(ModlabError, match="tensor parallelism"):
        modlab.convert(whole, alternate_layers(skip="kv", kv_cache_dtype="int8"))
    assert not modlab.is_converted(whole)


def test_far_positions_are_rounded_as_finely_as_near_ones() -> None:
    """A bias of keys that rotation turns: measured at the first positions, later ones would be coarse."""
    torch.manual_seed(0)
    config = tiny_config(attention_bias=True, max_position_embeddings=4096, rope_theta=1e5)
    model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.copy_(20 * torch.randn_like(layer.self_attn.k_proj.bias))
    modlab.convert(model, modlab.MoDConfig(layers="all", keep_recent=4, kv_cache_dtype="int8"))
    off = {}
    for first in (0, 3900):
        positions = torch.arange(40)[None] + first
        found = logits(model, position_ids=positions)
        with modlab.routing_off(model):
            off[first] = (found - logits(model, position_ids=positions)).square().mean().sqrt()
    assert off[3900] < 2 * off[0]
