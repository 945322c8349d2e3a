"""Routers that ship are the study's gates, bit for bit, under the product's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.real_models import pack
from benchmarks.real_models.gates import gate_values
from modlab.routing.router import HiddenRouter
from modlab.saving.demos import ROUTER_FOLDER, ROUTERS
from modlab.saving.description import read_description
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from modlab.saving.routers import read_routers

GATES = Path(pack.__file__).parent / "gates"


@pytest.mark.parametrize("name", ROUTERS)
def test_gates_are_those_of_the_study(name) -> None:
    """The product's routers and the study's gates say the same of the same states."""
    theirs = pack.load(GATES / f"{name.removesuffix('-kv')}.safetensors")
    said = read_description(ROUTER_FOLDER / name / CONFIG_FILE, name)
    routers = read_routers(ROUTER_FOLDER / name / ROUTER_FILE, name, said.routers)
    x = torch.randn(2, 50, theirs.shape.D, generator=torch.Generator().manual_seed(0)) * 3
    for layer in (0, theirs.shape.L // 2, theirs.shape.L - 1):
        mine = HiddenRouter(theirs.shape.D, 0.9, said.config.router_hidden, gates=theirs.shape.G)
        prefix = f"model.layers.{layer}.mod_router."
        mine.load_state_dict(
            {key.removeprefix(prefix): value for key, value in routers.items() if key.startswith(prefix)}
        )
        with torch.no_grad():
            torch.testing.assert_close(mine(x), gate_values(x, theirs.of(layer)).transpose(1, 2))
    card = json.loads((GATES / f"{name.removesuffix('-kv')}.json").read_text())
    for ratio, z in card["thresholds"].items():
        p = said.trained.savings[float(ratio)]  # type: ignore[union-attr]
        assert torch.logit(torch.tensor(p, dtype=torch.float64)).item() == pytest.approx(z)


@pytest.mark.parametrize("name", ["smollm2", "coder-0.5b"])
def test_gates_are_packed_as_those_that_are_committed(name, tmp_path: Path) -> None:
    """Packed once more they have the same bits, and scales in the same line."""
    bits = json.loads((GATES / f"{name}.json").read_text())["bits"]["hidden"]
    pack.save(pack.load(GATES / f"{name}.safetensors"), tmp_path / "again.safetensors", {}, bits)
    committed, again = load_file(GATES / f"{name}.safetensors"), load_file(tmp_path / "again.safetensors")
    assert committed.keys() == again.keys()
    for key, tensor in committed.items():
        torch.testing.assert_close(again[key].view(tensor.shape), tensor, rtol=1e-3, atol=0, msg=key)
        assert again[key].dtype == tensor.dtype
