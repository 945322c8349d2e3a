"""Training that starts from what another conversion of the same model has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.saving.routers import tensors_of
from tests.helpers.models import dense_llama, leaving_llama, narrow_config, scatter_gates

FORM: dict[str, Any] = {"layers": "all", "gates": "kv_head", "router_hidden": 4}


@pytest.fixture
def routers(tmp_path: Path) -> Path:
    model = scatter_gates(modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv", **FORM)), 2.0)
    modlab.set_threshold(model, {i: 0.1 + 0.1 * i for i in model.mod.layers})
    modlab.save_routers(model, tmp_path / "kv", "some/base")
    return tmp_path / "kv"


def added(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors_of(model).items() if ".mod_" in name}


def test_routers_come_from_there_and_projections_stay_new(routers: Path) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv+prompt", **FORM))
    before, taken = added(model), modlab.start_from(model, routers)
    after = added(model)
    assert {name.split(".mod_")[1].split(".")[0] for name in taken} == {"router"}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and changed <= set(taken)
    assert model.mod.thresholds == pytest.approx({i: 0.1 + 0.1 * i for i in range(6)})


def test_projections_are_taken_where_there_are_some(tmp_path: Path) -> None:
    model = leaving_llama("kv+prompt", "kv_head", router_hidden=4)
    modlab.save_routers(model, tmp_path / "both", "some/base")
    other = leaving_llama("kv+prompt", "kv_head", router_hidden=4, by=0.0)
    modlab.start_from(other, tmp_path / "both")
    want = added(model)
    assert all(torch.equal(tensor, want[name]) for name, tensor in added(other).items())
    alone = modlab.convert(dense_llama(), modlab.MoDConfig(skip="prompt"))
    assert all("projections" in name for name in modlab.start_from(alone, tmp_path / "both"))


def test_a_router_of_another_form_is_not_taken_in_part(routers: Path) -> None:
    for fields in ({**FORM, "router_hidden": 0}, {**FORM, "gates": "layer"}):
        model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv", **fields))
        before = added(model)
        with pytest.raises(ModlabError, match="nothing of .* fits"):
            modlab.start_from(model, routers)
        assert all(torch.equal(tensor, before[name]) for name, tensor in added(model).items())


def test_a_folder_without_routers_and_another_base_are_refused(routers: Path, tmp_path: Path) -> None:
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv", **FORM))
    with pytest.raises(ModlabError, match="no routers to start from"):
        modlab.start_from(model, tmp_path)
    with pytest.raises(ModlabError, match="no such folder.*coder-0.5b-kv"):
        modlab.start_from(model, tmp_path / "nothing")
    with torch.no_grad():
        model.get_input_embeddings().weight.neg_()
    with pytest.raises(ModlabError):
        modlab.start_from(model, routers)


def test_recent_tokens_beyond_a_window_change_nothing(tmp_path: Path) -> None:
    def windowed(keep_recent: int) -> Any:
        torch.manual_seed(0)
        dense = Gemma2ForCausalLM(narrow_config(Gemma2Config, head_dim=8, sliding_window=64)).eval()
        return modlab.convert(dense, modlab.MoDConfig(layers="all", keep_recent=keep_recent))

    modlab.save_routers(scatter_gates(windowed(128), 2.0), tmp_path / "kv", "some/base")
    model = windowed(16)
    before = added(model)
    with pytest.raises(ModlabError, match="sliding window of layer 0"):
        modlab.start_from(model, tmp_path / "kv")
    assert all(torch.equal(tensor, before[name]) for name, tensor in added(model).items())
    assert model.mod.config.keep_recent == 16
