"""A saved folder is the converted model with modlab, the dense one without; saving is all or nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import modlab
from modlab.errors import ModlabError
from tests.helpers.models import narrow_config
from tests.helpers.routing import IDS


def in_fresh_process(script: str, folder: Path, tmp_path: Path) -> tuple:
    """What `script` stores in `out`, given `folder` and `ids`, and what it wrote to stderr."""
    torch.save(IDS, tmp_path / "ids.pt")
    script = f"import sys, torch\nfolder, ids = sys.argv[1], torch.load(sys.argv[2])\n{script}"
    script += "\ntorch.save(out, sys.argv[3])\n"
    arguments = [str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True
    )
    return *torch.load(tmp_path / "out.pt"), done.stderr


@torch.no_grad()
def test_reloads_to_equal_logits_in_a_fresh_process(tiny_llama, saved, tmp_path) -> None:
    """By modlab.load, and by AutoModelForCausalLM after `import modlab` alone."""
    script = (
        "import modlab\n"
        "from transformers import AutoModelForCausalLM\n"
        "auto = AutoModelForCausalLM.from_pretrained(folder)\n"
        "model, tokenizer = modlab.load(folder)\n"
        "out = [(m(ids).logits.detach(), m.mod.thresholds) for m in (auto, model)]"
    )
    *both, stderr = in_fresh_process(script, saved, tmp_path)
    for logits, thresholds in both:
        assert torch.equal(logits, tiny_llama(IDS).logits)
        assert thresholds == {1: 0.3, 3: 0.6, 5: 0.5}
    assert "quantiz" not in stderr and "MISSING" not in stderr


@torch.no_grad()
def test_without_modlab_the_folder_is_the_dense_model(tiny_llama, saved, tmp_path) -> None:
    """And with it imported later, the converted one."""
    script = (
        "from transformers import AutoModelForCausalLM\n"
        "dense = AutoModelForCausalLM.from_pretrained(folder)\n"
        "assert 'modlab' not in sys.modules and not hasattr(dense, 'mod')\n"
        "import modlab\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "assert modlab.is_converted(model) and not model.is_quantized\n"
        "assert not hasattr(model.config, 'quantization_config')\n"
        "out = [type(dense).__name__, dense(ids).logits.detach(), model(ids).logits.detach()]"
    )
    name, dense, converted, stderr = in_fresh_process(script, saved, tmp_path)
    assert torch.equal(converted, tiny_llama(IDS).logits)
    assert name == "LlamaForCausalLM" and torch.equal(dense, modlab.revert(tiny_llama)(IDS).logits)
    assert "got modlab" in stderr and "skip" in stderr  # transformers says that it does not know modlab
    assert "unexpected" not in stderr.lower()
    assert not any("router" in name for name in load_file(saved / "model.safetensors"))
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@torch.no_grad()
def test_auto_model_finds_the_routers_of_a_hub_id(tiny_llama, saved, tmp_path, monkeypatch) -> None:
    """In the hub's cache, at another revision than main and in a subfolder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit, repo = "0" * 39 + "1", tmp_path / "cache" / "models--somebody--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "old").write_text(commit)
    shutil.copytree(saved, repo / "snapshots" / commit / "sub")
    model = AutoModelForCausalLM.from_pretrained(
        "somebody/model", revision="old", subfolder="sub", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)


@torch.no_grad()
def test_third_party_tools_see_no_trace_of_the_registry(saved) -> None:
    """What transformers' quantised models cannot do, a converted one can."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.half().dtype == torch.float16
    assert getattr(model, "hf_quantizer", None) is None


def test_nothing_that_can_be_executed_is_written(saved) -> None:
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors", ".md"}
    assert not [p for p in saved.parent.iterdir() if p != saved]


def test_failed_save_leaves_the_old_folder_intact(tiny_llama, saved, monkeypatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    modlab.set_threshold(tiny_llama, 0.9)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modlab.saving.routers.save_file", full_disk)
    with pytest.raises(ModlabError, match="No space left on device.*as it was"):
        tiny_llama.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_really_full_disk(tiny_llama, tmp_path) -> None:
    """A file-size limit of the process stands in for a full disk: the write itself fails, in safetensors."""
    script = (
        "import resource, signal, sys, torch, modlab\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = modlab.convert(LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, "
        "intermediate_size=128,"
        " num_hidden_layers=2, num_attention_heads=4)))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    target = tmp_path / "model"
    result = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ModlabError: saving to" in result.stderr
    assert not list(tmp_path.iterdir())


def test_shards_of_an_earlier_save_do_not_stay(tiny_llama, tmp_path) -> None:
    folder = tmp_path / "m"
    tiny_llama.save_pretrained(folder, max_shard_size="200KB")
    (folder / "notes.txt").write_text("mine")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    tiny_llama.save_pretrained(folder)
    assert sorted(p.name for p in folder.glob("model*")) == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_state_without_routers_is_refused(tiny_llama, saved) -> None:
    """They would be missing from a folder that held them."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    dense = {name: tensor for name, tensor in tiny_llama.state_dict().items() if ".mod_" not in name}
    for state in (dense, {}):
        with pytest.raises(ModlabError, match="state_dict given lacks"):
            tiny_llama.save_pretrained(saved, state_dict=state)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_layers_left_out_for_their_window_stay_out_after_a_reload(tmp_path) -> None:
    """What names such as "all" mean depends on the number of recent tokens, which may be changed any time."""
    config = narrow_config(Gemma2Config, head_dim=8, sliding_window=64)
    torch.manual_seed(0)
    model = modlab.convert(Gemma2ForCausalLM(config).eval(), modlab.MoDConfig(layers="all", keep_recent=128))
    assert model.mod.layers == [1, 3]
    modlab.set_keep_recent(model, 16)
    model.save_pretrained(tmp_path / "model")
    reloaded = modlab.load(tmp_path / "model")[0]
    assert reloaded.mod.layers == [1, 3] and reloaded.mod.config.keep_recent == 16
    modlab.revert(model)
    again = modlab.convert(model, modlab.MoDConfig(layers="all", keep_recent=16))
    modlab.set_keep_recent(again, 32)
    assert again.mod.config.layers == "all", "none is left out"
