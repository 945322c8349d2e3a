"""Whatever is claimed to be routed did run routed: models that other libraries have wrapped or spread over
devices, before conversion and after it."""

from __future__ import annotations

import types
from typing import Any

import accelerate
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaForCausalLM

import modlab
from modlab.errors import ModlabError
from tests.helpers.models import scatter_gates

IDS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
SKIPS = ["kv", "layer", "attention", "mlp"]


def config(skip: str) -> modlab.MoDConfig:
    return modlab.MoDConfig(skip=skip, layers=[1, 3], keep_recent=3, keep_first=1)


def routed_logits(model: Any) -> torch.Tensor:
    scatter_gates(model)
    with torch.no_grad(), modlab.record_routing(model) as recording:
        logits = model(IDS, use_cache=False).logits
    assert sorted(recording.steps[0].keep) == [1, 3]
    return logits


@pytest.mark.parametrize("skip", SKIPS)
def test_a_model_whose_weights_are_brought_in_for_each_call_is_routed(
    make_llama: Any, skip: str, tmp_path: Any
) -> None:
    """Offloading to disk stands for a second device: in both cases accelerate puts forwards on the layers."""
    make_llama().save_pretrained(tmp_path / "dense")
    want = routed_logits(modlab.convert(make_llama(), config(skip)))
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(6)}
    spread = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=where, offload_folder=str(tmp_path / "offload")
    ).eval()
    with torch.no_grad():
        dense = spread(IDS, use_cache=False).logits
    modlab.convert(spread, config(skip))
    torch.testing.assert_close(routed_logits(spread), want)
    modlab.revert(spread)
    with torch.no_grad():
        assert torch.equal(spread(IDS, use_cache=False).logits, dense), "revert leaves a working model"


def test_a_model_that_accelerate_spreads_by_itself_is_routed(make_llama: Any, tmp_path: Any) -> None:
    """`device_map="auto"` with memory for a part of the layers: the others come from the disk."""
    make_llama().save_pretrained(tmp_path / "dense")
    alone = modlab.convert(make_llama(), config("kv"))
    want = routed_logits(alone)
    size = sum(p.nbytes for p in alone.parameters())
    spread = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense",
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=str(tmp_path / "offload"),
    ).eval()
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    modlab.convert(spread, config("kv"))
    torch.testing.assert_close(routed_logits(spread), want)
    tokens = [m.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (spread, alone)]
    assert torch.equal(*tokens)
    with pytest.raises(ModlabError, match="spread over several devices"):
        modlab.enable_fast_generation(spread)


@pytest.mark.parametrize("known", [True, False], ids=["routers known", "fresh"])
def test_weights_that_lie_elsewhere_between_forwards_train(make_llama: Any, known: bool) -> None:
    """Offloaded ones are on the meta device in front of a forward: whether they have learned is not asked."""
    model = accelerate.cpu_offload(make_llama(), "cpu")
    modlab.convert(model, config("kv"))
    model.mod.source = "somewhere" if known else ""
    model.train()
    for _ in range(2):
        assert model(IDS, labels=IDS).loss.requires_grad
    assert model.mod.source == ("somewhere" if known else "") and not model.mod.base_trained


def test_weights_that_are_brought_away_after_a_forward_have_not_learned(make_llama: Any) -> None:
    model = modlab.convert(make_llama(), config("kv"))
    model.mod.source = "somewhere"
    model.train()
    model(IDS, labels=IDS).loss.backward()
    accelerate.cpu_offload(model, "cpu")
    model(IDS)
    assert model.mod.source == "somewhere" and not model.mod.base_trained


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("wrap", ["checkpoint_wrapper", "compile of a layer"])
def test_layers_wrapped_before_conversion_are_routed(make_llama: Any, skip: str, wrap: str) -> None:
    want = routed_logits(modlab.convert(make_llama(), config(skip)))
    model = make_llama()
    with torch.no_grad():
        dense = model(IDS, use_cache=False).logits
    for index, layer in enumerate(model.model.layers):
        if wrap == "checkpoint_wrapper":
            model.model.layers[index] = checkpoint_wrapper(layer)
        else:
            layer.compile(backend="eager")
    modlab.convert(model, config(skip))
    torch.testing.assert_close(routed_logits(model), want)
    modlab.revert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, use_cache=False).logits, dense)


def put_forward_on(module: Any) -> None:
    """As a library does that patches objects: one of the object's own, which calls the dense class's."""
    own = getattr(type(module), "dense_class", type(module)).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: own(self, *args, **kwargs), module)


PARTS = {"kv": "self_attn", "layer": "", "attention": "self_attn", "mlp": "mlp"}


@pytest.mark.parametrize("skip", SKIPS)
def test_a_forward_put_on_an_object_before_conversion_is_refused(make_llama: Any, skip: str) -> None:
    model = make_llama()
    put_forward_on(model.model.layers[3].get_submodule(PARTS[skip]))
    with pytest.raises(ModlabError, match=r"layer 3 has a `forward` of its own on the object"):
        modlab.convert(model, config(skip))
    assert not modlab.is_converted(model)


@pytest.mark.parametrize("skip", SKIPS)
def test_a_forward_put_on_an_object_after_conversion_is_found_out(make_llama: Any, skip: str) -> None:
    model = modlab.convert(make_llama(), config(skip))
    put_forward_on(model.model.layers[3].get_submodule(PARTS[skip]))
    with pytest.raises(ModlabError, match="of layer 3 ran past its router"):
        model(IDS)


def test_a_wrapper_that_calls_what_it_wraps_is_welcome(make_llama: Any) -> None:
    model = modlab.convert(make_llama(), config("kv"))
    want = routed_logits(model)
    attention = model.model.layers[3].self_attn
    inner, calls = attention.forward, []
    attention.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    assert torch.equal(routed_logits(model), want) and calls


def test_a_model_without_weights_is_refused(make_llama: Any) -> None:
    model = make_llama().to("meta")
    with pytest.raises(ModlabError, match="no weights yet"):
        modlab.convert(model)
