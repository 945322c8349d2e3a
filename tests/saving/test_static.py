"""Folders in which window layers stand for routers, as plain transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import modlab
from modlab.cli.program import main
from modlab.errors import ModlabError
from modlab.saving import static
from modlab.saving.static import as_static, export_static, static_layers
from tests.helpers.models import narrow_config, scatter_gates

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, "ministral"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen3"),
}


def routed(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config, model, _ = FAMILIES[family]
    model = model(narrow_config(config, initializer_range=0.2, **more)).eval()
    modlab.convert(model, modlab.MoDConfig(layers=[1, 2, 3], keep_recent=6))
    scatter_gates(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_plain_transformers_computes_the_masked_reference(tmp_path: Path, family: str, tied: bool) -> None:
    model = routed(family, tie_word_embeddings=tied)
    export_static(model, None, tmp_path, [1, 3])
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == FAMILIES[family][2] and written["sliding_window"] == 6
    assert [kind.split("_")[0] for kind in written["layer_types"]] == ["full", "sliding", "full", "sliding"]
    assert not list(tmp_path.glob("modlab*")) and "quantization_config" not in written
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not modlab.is_converted(plain)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), modlab.routing_override(model, as_static([1, 3])):
        want = model(ids, use_cache=False).logits
        torch.testing.assert_close(plain(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), out)


def test_a_converted_model_that_is_overwritten_leaves_no_routers(tmp_path: Path) -> None:
    model = routed("qwen3")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modlab_config.json").is_file() and (tmp_path / "modlab_router.safetensors").is_file()
    (tmp_path / "notes.txt").write_text("mine")
    export_static(model, None, tmp_path, [1])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("modlab_")]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not modlab.is_converted(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_windows_that_would_be_ignored_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ModlabError, match="ignored without a word"):
        export_static(modlab.convert(other, modlab.MoDConfig(layers="all")), None, tmp_path / "a", [1])
    monkeypatch.setitem(static.SERVED_AS, "llama", "llama")  # reads no layer_types
    with pytest.raises(ModlabError, match="LlamaForCausalLM does not honour the windows"):
        export_static(routed("llama"), None, tmp_path / "b", [1])
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match=r"layers \[0\] are not routed"):
        export_static(routed("llama"), None, tmp_path, [0, 1])
    with pytest.raises(ModlabError, match="which ministral has not"):
        export_static(routed("llama", attention_bias=True), None, tmp_path, [1])
    layers = modlab.convert(LlamaForCausalLM(narrow_config()), modlab.MoDConfig(skip="layer"))
    with pytest.raises(ModlabError, match="no static form"):
        export_static(layers, None, tmp_path, [1])
    with pytest.raises(ModlabError, match=r"2: 0\.30"):
        static_layers({1: 0.5, 2: 0.3}, below=0.1)
    assert static_layers({1: 0.5, 2: 0.1, 4: 0.0}, below=0.1) == [2, 4]
    for wrong in (-1, 1.5, 1e9, float("nan"), float("inf")):
        with pytest.raises(ModlabError, match=r"below="):
            static_layers({1: 0.5}, below=wrong)


def test_the_command_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n" * 400)
    out = tmp_path / "static"
    command = ["export", "demo-kv", "--static", str(out), "--data", str(text), "--layers", "2,3"]
    command += ["--seq-len", "256", "--distances", "96", "--rows", "2", "--limit-tokens", "2048"]
    assert main(command) == 0
    report = json.loads((out / "export.json").read_text())
    assert set(report["costs"]) == {"dense", "routed", "static"}
    assert report["costs"]["static"]["kv_bytes"] < report["costs"]["dense"]["kv_bytes"]
    assert "window layers [2, 3]" in capsys.readouterr().out
    assert main(command) == 2


def test_eight_bits_are_no_part_of_a_static_form(tmp_path: Path) -> None:
    model = routed("qwen2")
    modlab.set_kv_cache_dtype(model, "int8")
    with pytest.raises(ModlabError, match="--kv-cache-dtype auto"):
        export_static(model, None, tmp_path, [1, 3])
    assert not list(tmp_path.iterdir())
    modlab.set_kv_cache_dtype(model, "auto")
    export_static(model, None, tmp_path, [1, 3])
