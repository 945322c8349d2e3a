"""Routers without the weights of their base: saved, loaded from a folder and from a hub id, refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.training.loop import TrainConfig, train
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.training import changes

IDS = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(base):
    """That model, routed, its routers trained and nothing else."""
    model = modlab.convert(modlab.load(base)[0], alternate_layers(skip="kv", keep_recent=4))
    with changes(model) as changed:
        scatter_gates(model)
        train(model, IDS, TrainConfig(steps=2, batch_size=2, freeze_base=True, calibrate=False))
    assert changed and all("router" in name for name in changed)
    modlab.set_threshold(model, {1: 0.4})
    return model.eval()


@torch.no_grad()
def test_a_folder_of_routers_is_loaded_on_its_base(model, base, tmp_path) -> None:
    modlab.save_routers(model, tmp_path / "routers", base_model=str(base))
    files = {p.name: p.stat().st_size for p in (tmp_path / "routers").iterdir()}
    assert set(files) == {"modlab_config.json", "modlab_router.safetensors", "README.md"}
    assert sum(files.values()) < 10_000
    loaded, tokenizer = modlab.load(tmp_path / "routers")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits) and len(tokenizer)
    assert loaded.mod.config == model.mod.config and loaded.mod.thresholds == model.mod.thresholds
    card = (tmp_path / "routers" / "README.md").read_text()
    assert "routers alone" in card and str(base) in card and "plain transformers" not in card
    modlab.save_routers(loaded, tmp_path / "again")  # it knows its base now
    assert json.loads((tmp_path / "again" / "modlab_config.json").read_text())["base_model"] == str(base)
    assert modlab.load(tmp_path / "routers", dtype=torch.float16)[0].dtype == torch.float16


@torch.no_grad()
def test_routers_and_base_by_hub_ids(model, base, tmp_path, monkeypatch) -> None:
    """Both in the hub's cache, as after a download."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "cache"
    modlab.save_routers(model, tmp_path / "routers", base_model="somebody/base")
    for name, folder in (("base", base), ("routers", tmp_path / "routers")):
        repo, commit = cache / f"models--somebody--{name}", "0" * 40
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repo / "snapshots" / commit)
    loaded, _ = modlab.load("somebody/routers", cache_dir=str(cache), local_files_only=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_base_has_to_be_named(model, base, tmp_path) -> None:
    with pytest.raises(ModlabError, match="give save_routers its base_model"):
        modlab.save_routers(model, tmp_path / "routers")
    modlab.save_routers(model, tmp_path / "routers", base_model=str(base))
    assert model.mod_base_model is None, "saving changes nothing"
    description = tmp_path / "routers" / "modlab_config.json"
    values = json.loads(description.read_text()) | {"base_model": None}
    description.write_text(json.dumps(values))
    with pytest.raises(ModlabError, match="does not name their base"):
        modlab.load(tmp_path / "routers")


def test_trained_base_weights_do_not_get_lost(base, model, tmp_path) -> None:
    """Routers alone would be put into the base as it was."""
    model.mod_base_model = "somebody/base"
    modlab.save_routers(model, tmp_path / "frozen")
    train(model, IDS, TrainConfig(steps=1, batch_size=2, calibrate=False))
    with pytest.raises(ModlabError, match="have been trained, or may have been"):
        modlab.save_routers(model, tmp_path / "routers")
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(base / "tokenizer.json", tmp_path / "whole")
    loaded, _ = modlab.load(tmp_path / "whole")
    with pytest.raises(ModlabError, match="have been trained, or may have been"):
        modlab.save_routers(loaded, tmp_path / "routers")
    with pytest.raises(ModlabError, match="holds a model"):
        modlab.save_routers(model, tmp_path / "whole", base_model=str(base))


def test_an_expert_router_is_part_of_the_base(tmp_path) -> None:
    """It is frozen with the rest, or saving routers alone would lose it."""
    model = tiny_model("granitemoe")
    modlab.convert(model, alternate_layers(skip="kv", keep_recent=4))
    experts = {n: p.clone() for n, p in model.named_parameters() if "router" in n and "mod_router" not in n}
    assert experts, "this type should have routers of its own"
    ids = torch.randint(3, 60, (2, 16))
    train(model, ids, TrainConfig(steps=2, batch_size=2, lr=1e-2, freeze_base=True, calibrate=False))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], before) for n, before in experts.items())
    assert not model.mod.base_trained


def test_a_base_that_is_converted_or_another_model_is_refused(model, base, tmp_path, make_llama) -> None:
    model.save_pretrained(tmp_path / "converted")
    shutil.copy(base / "tokenizer.json", tmp_path / "converted")
    modlab.save_routers(model, tmp_path / "routers", base_model=str(tmp_path / "converted"))
    with pytest.raises(ModlabError, match="is converted itself"):
        modlab.load(tmp_path / "routers")
    make_llama(hidden_size=32).save_pretrained(base)
    modlab.save_routers(model, tmp_path / "routers", base_model=str(base))
    with pytest.raises(ModlabError, match="hidden_size=64, and this base has 32"):
        modlab.load(tmp_path / "routers")
