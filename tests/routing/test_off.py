"""routing_off: a converted model computes what the dense one does, bit for bit, and is routed again after."""

import pytest
import torch

import modlab
from modlab.cache.ragged import RaggedCache
from modlab.errors import ModlabError
from tests.helpers.models import dense_llama, routed_llama

SKIPS = ["kv", "layer", "attention", "mlp"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("skip", SKIPS)
def test_logits_are_the_dense_models_bit_for_bit(ids, skip):
    model, dense = routed_llama(skip=skip), dense_llama()
    with torch.no_grad():
        routed = model(ids).logits
        with modlab.routing_off(model):
            assert torch.equal(model(ids).logits, dense(ids).logits)
        assert torch.equal(model(ids).logits, routed)
        assert not torch.allclose(routed, dense(ids).logits)


@pytest.mark.parametrize("gate", ["paper", "fused"])
def test_no_gate_scales_an_output(ids, gate):
    model, dense = routed_llama(gate=gate), dense_llama()
    with torch.no_grad(), modlab.routing_off(model):
        assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("skip", SKIPS)
def test_generate_uses_the_dense_cache_and_gives_the_dense_text(ids, skip):
    model, dense = routed_llama(skip=skip), dense_llama()
    asked = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with modlab.routing_off(model):
        got = model.generate(ids, **asked)
    assert torch.equal(got.sequences, dense.generate(ids, **asked).sequences)
    assert not isinstance(got.past_key_values, RaggedCache)


def test_fast_generation_stands_aside(ids):
    model, dense = modlab.enable_fast_generation(routed_llama(skip="kv")), dense_llama()
    with modlab.routing_off(model):
        text = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, dense.generate(ids, max_new_tokens=6, do_sample=False))
    assert modlab.fast_generation_report(model)["last"]["why"] == "routing is off"


def test_a_ragged_cache_is_refused(ids):
    model = routed_llama(skip="kv")
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with modlab.routing_off(model), pytest.raises(ModlabError, match="RaggedCache, and routing is off"):
            model(ids[:, :1], past_key_values=cache)


def test_a_dense_model_is_refused():
    with pytest.raises(ModlabError, match="is dense"), modlab.routing_off(dense_llama()):
        pass


@pytest.mark.parametrize("skip", SKIPS)
def test_recomputed_forwards_are_what_they_were_whatever_is_off_by_then(ids, skip):
    """Gradient checkpointing runs a layer again in the backward pass."""

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = routed_llama(skip=skip).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with modlab.routing_off(model):
            teacher = model(ids).logits
        student = model(ids).logits
        with modlab.routing_off(model):
            (teacher.square().mean() + student.square().mean()).backward()
        return model.model.layers[0].mlp.up_proj.weight.grad

    assert torch.equal(gradient(checkpointing=True), gradient(checkpointing=False))
