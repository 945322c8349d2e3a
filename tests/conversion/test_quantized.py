"""Models that a real quantisation library holds in 8 or 4 bits convert as any other, and route exactly."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.quantizers import quantizer_quanto

import modlab
from modlab.errors import ModlabError
from modlab.routing.state import masked_execution
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.routing import IDS, MASK, random_routing
from tests.helpers.tokenizers import make_tokenizer

NEW = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def torchao_int8() -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_int8() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def quanto_int8() -> QuantoConfig:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


@pytest.fixture
def folder(make_llama, tmp_path):
    make_llama(num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes warns at every product that it computes in fp16."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


@pytest.mark.parametrize("config", [alternate_layers(), modlab.MoDConfig(keep_recent=3)], ids=["layer", "kv"])
@pytest.mark.parametrize("quantization", [torchao_int8, bitsandbytes_int8, bitsandbytes_4bit, quanto_int8])
def test_converts_routes_and_generates(folder, quantization, config) -> None:
    model, _ = modlab.load(folder, quantization_config=quantization(), dtype=torch.float32)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype == torch.uint8
    with torch.no_grad():
        dense = model(IDS, use_cache=False).logits
        modlab.convert(model, config)
        assert torch.equal(model(IDS, use_cache=False).logits, dense)

    with modlab.routing_override(model, random_routing()):
        packed = logits(model)
        cached = model.generate(IDS, attention_mask=MASK, **NEW)
        with masked_execution(model):
            # 8-bit products of bitsandbytes round to fp16
            torch.testing.assert_close(packed, logits(model), atol=2e-3, rtol=2e-2)
            assert torch.equal(cached, model.generate(IDS, attention_mask=MASK, use_cache=False, **NEW))
    assert not torch.allclose(packed, logits(model), atol=1e-2)


@pytest.mark.parametrize(
    ("quantization", "saves"),
    [(torchao_int8, True), (bitsandbytes_int8, True), (bitsandbytes_4bit, True), (quanto_int8, False)],
)
@pytest.mark.parametrize("routed", [{}, {"skip": "kv", "kv_cache_dtype": "int8"}], ids=["layer", "kv int8"])
def test_saves_and_loads(folder, tmp_path, quantization, saves, routed) -> None:
    model, _ = modlab.load(folder, quantization_config=quantization(), dtype=torch.float32)
    modlab.convert(model, alternate_layers(**routed))
    scatter_gates(model)
    logits(model)  # bitsandbytes packs 4-bit weights for a CPU when they are first used
    target = tmp_path / "saved"
    if not saves:
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(target)
        assert not target.exists()
        return
    model.save_pretrained(target)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] != "modlab"
    make_tokenizer().save_pretrained(target)
    again, _ = modlab.load(target)
    assert modlab.is_converted(again) and torch.equal(logits(again), logits(model))


def test_reverting_gives_the_quantised_dense_model(folder) -> None:
    model, _ = modlab.load(folder, quantization_config=torchao_int8(), dtype=torch.float32)
    dense = logits(model)
    modlab.convert(model)
    scatter_gates(model)
    assert torch.equal(logits(modlab.revert(model)), dense)


def test_a_converted_folder_can_be_quantised_as_it_loads(folder, tmp_path) -> None:
    model, tokenizer = modlab.load(folder)
    modlab.convert(model, alternate_layers())
    scatter_gates(model)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mod")
    small, _ = modlab.load(tmp_path / "mod", quantization_config=torchao_int8())
    assert (
        modlab.is_converted(small) and type(small.model.layers[1].mlp.up_proj.weight).__name__ == "Int8Tensor"
    )
    assert small.model.layers[1].mod_router.weight.dtype == torch.float32
    torch.testing.assert_close(logits(small), logits(model), atol=0.05, rtol=0.1)


def test_a_missing_library_is_named(folder, monkeypatch) -> None:
    monkeypatch.setattr(quantizer_quanto, "is_optimum_quanto_available", lambda: False)
    with pytest.raises(ModlabError, match="optimum-quanto"):
        modlab.load(folder, quantization_config=QuantoConfig(weights="int8"))
