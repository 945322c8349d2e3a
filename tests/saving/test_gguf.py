"""GGUF files load as transformers loads them; what is made of them can be saved, or a refusal says how."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modlab
from modlab.errors import ModlabError
from tests.helpers.gguf_files import write_gguf
from tests.helpers.models import scatter_gates

pytest.importorskip("gguf")
IDS = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "quantised").mkdir()
    write_gguf(tmp_path / "quantised" / "tiny.gguf")
    return tmp_path / "quantised"


@torch.no_grad()
def test_it_loads_as_transformers_loads_it(folder) -> None:
    model, tokenizer = modlab.load(folder, gguf_file="tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    assert torch.equal(model(IDS).logits, theirs(IDS).logits) and not modlab.is_converted(model)
    words = AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf")
    assert tokenizer("t3 t4").input_ids == words("t3 t4").input_ids


@torch.no_grad()
@pytest.mark.parametrize("by", ["modlab", "transformers"])
def test_converted_it_is_saved_and_loads_again(folder, tmp_path, by) -> None:
    model, tokenizer = modlab.load(folder, gguf_file="tiny.gguf")
    if by == "transformers":
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf").eval()
    scatter_gates(modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all")))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = modlab.load(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and modlab.is_converted(again)
    assert modlab.is_converted(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


@torch.no_grad()
def test_routers_alone_go_into_it(folder, tmp_path) -> None:
    model, _ = modlab.load(folder, gguf_file="tiny.gguf")
    scatter_gates(modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all")))
    modlab.save_routers(model, tmp_path / "routers", base_model=str(folder))
    again, _ = modlab.load(tmp_path / "routers", gguf_file="tiny.gguf")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ModlabError, match="gguf_file='tiny.gguf'"):
        modlab.load(tmp_path / "routers")


def test_files_that_are_not_there_or_no_gguf(folder) -> None:
    with pytest.raises(ModlabError, match="name the file: gguf_file='tiny.gguf'"):
        modlab.load(folder)
    with pytest.raises(ModlabError, match="no file 'other.gguf'.*tiny.gguf"):
        modlab.load(folder, gguf_file="other.gguf")
    whole = (folder / "tiny.gguf").read_bytes()
    for damaged in (b"", b"GGUF", whole[:1000], b"\0" * 500):
        (folder / "tiny.gguf").write_bytes(damaged)
        with pytest.raises(ModlabError, match="cannot be loaded"):
            modlab.load(folder, gguf_file="tiny.gguf")


@pytest.mark.parametrize(("method", "cure"), [("gguf", "dequantize=True"), ("eetq", "save_routers")])
def test_weights_that_stay_packed_are_not_saved_and_it_says_what_is(folder, tmp_path, method, cure) -> None:
    model, _ = modlab.load(folder, gguf_file="tiny.gguf")
    modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all"))
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method=method),
        packed_modules={"model.layers.0.mlp.up_proj.weight": None},
        is_serializable=lambda: False,
    )
    with pytest.raises(ModlabError, match=f"quantised by {method}.*{cure}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
