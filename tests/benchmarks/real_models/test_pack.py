"""Packed gates say nearly the same, in a fraction of the bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.real_models import pack
from benchmarks.real_models.base import Shape
from benchmarks.real_models.gates import GateForm, Gates, gate_values


def test_gates_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = Shape(L=2, D=128, N=4, G=2, H=32, V=97, eps=1e-6, theta=1e4, context=512)
    gates = Gates(shape, GateForm(hidden=8))
    for weight in gates.parameters():
        weight.data = torch.randn_like(weight)
    size = pack.save(gates, tmp_path / "gates.safetensors", {"data": "noise"}, bits=6)
    again = pack.load(tmp_path / "gates.safetensors")
    x = torch.randn(1, 50, shape.D)
    theirs, mine = (gate_values(x, one.of(1)) for one in (gates, again))
    assert (mine - theirs).std() < 0.05 * theirs.std()
    assert size < gates.save(tmp_path / "wide.safetensors", {})
    assert again.form == gates.form


@pytest.mark.parametrize("model", ["smollm2", "coder-0.5b"])
def test_committed_gates_are_small_and_know_their_base(model: str) -> None:
    folder = Path(pack.__file__).parent / "gates"
    path = folder / f"{model}.safetensors"
    assert path.stat().st_size < 300_000
    gates, card = pack.load(path), json.loads((folder / f"{model}.json").read_text())
    assert gates.form == GateForm() and len(gates.layers) == gates.shape.L
    assert len(card["gguf_sha256"]) == 64
    thresholds = [card["thresholds"][ratio] for ratio in ("2", "4", "8", "16")]
    assert thresholds == sorted(thresholds)
    record = json.loads((folder.parents[1] / "results" / f"real_{model}_2026-11-29.json").read_text())
    run = card["results"].split("run ")[1].split(" ")[0]
    rows = [row for row in record["rows"] if row["run"] == run and ":" not in row["arm"]]
    measured = {row["ratio_asked"]: row for row in rows}
    assert measured[4.0]["threshold"] == card["thresholds"]["4"]
