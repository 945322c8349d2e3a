"""Scores, thresholds, controls and a whole arm, on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.real_models import evaluate, pack, scores
from benchmarks.real_models.base import Base
from benchmarks.real_models.controls import chance, controls, largest, scaled
from benchmarks.real_models.gates import GateForm, Gates
from benchmarks.real_models.mixture import Mixture
from benchmarks.real_models.run import WINDOW, Study
from benchmarks.real_models.texts import Data


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "FAR", 256)


def test_scores_are_regressed_in_closed_form(base: Base, data: Data) -> None:
    rows = list(Mixture(data.stream, data.lines).rows(120, 60))
    prompt = torch.from_numpy(data.prompt).long()
    linear, hidden = Gates(base.shape, GateForm(hidden=0)), Gates(base.shape, GateForm(hidden=8))
    one = scores.fit(base, linear, rows, prompt, say=lambda _: None)
    two = scores.fit(base, hidden, rows, prompt, say=lambda _: None)
    assert one.r2 == one.r2_linear == two.r2_linear
    assert one.r2 > 0 and two.r2 > one.r2


def test_thresholds_store_what_is_asked(base: Base, data: Data) -> None:
    gates = Gates(base.shape, GateForm())
    for weight in gates.parameters():
        weight.data = torch.randn_like(weight)
    known = evaluate.dense(base, data)
    evaluate.set_threshold(base, gates, data, 2.0, WINDOW)
    found = evaluate.measure(base, gates, data, known, WINDOW)
    assert abs(found["ratio"] - 2.0) < 0.2
    assert set(found["recall_gap"]) == {"256"} and set(found["retrieval"]) == {"128", "256"}
    everything = evaluate.measure(base, gates, data, known, WINDOW, lambda layer, z: z > -torch.inf)
    assert everything["ratio"] == 1.0
    assert abs(everything["kl_far"]) < 1e-4 and abs(everything["recall_gap"]["256"]) < 1e-3


def test_controls_have_the_bytes_of_the_gates(base: Base, data: Data) -> None:
    gates, known = Gates(base.shape, GateForm()), evaluate.dense(base, data)
    kept = [[0.9, 0.1], [0.5, 0.5]]
    seen = []
    for name, window, rule in controls(kept, 2.0, 512, WINDOW, 4):
        found = evaluate.measure(base, gates, data, known, window, rule)
        seen.append(name)
        assert abs(found["ratio"] - 2.0) < 0.45 if "whole" in name else abs(found["ratio"] - 2.0) < 0.1, name
    assert seen == [
        "chance",
        "chance per layer",
        "chance per head",
        "whole heads",
        "whole layers",
        "window alone",
    ]


def test_shares_are_scaled_to_a_mean() -> None:
    share = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    assert abs(scaled(share, 0.6).mean() - 0.6) < 1e-4 and scaled(share, 0.6).max() == 1.0
    assert largest(share, 0.25).tolist() == [[True, False], [False, False]]
    kept = chance(torch.tensor([[0.0, 1.0]]))(0, torch.zeros(3, 2, 9))
    assert not kept[:, 0].any() and kept[:, 1].all()


def test_an_arm_leaves_gates_and_rows(base: Base, data: Data, tmp_path: Path) -> None:
    study = Study("tiny", base, data, tmp_path)
    changes = {"batch": 512, "length": 256, "long": 512, "score_rows": 8}
    gates = study.train("head", 3 * 512, **changes)
    study.measure("head", gates, [2.0], [2.0], 3 * 512)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows][:2] == ["head", "head: chance"]
    needed = {"model", "arm", "granularity", "tokens", "seed", "ratio_asked", "ratio", "kl_far", "tasks"}
    needed |= {"recall_gap", "retrieval", "retrieval_dense", "keep_by_text"}
    assert all(needed <= set(row) for row in rows)
    assert pack.load(tmp_path / "gates_head.safetensors").form == gates.form
