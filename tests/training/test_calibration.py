"""How a run ends: the share that was asked for is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab.measure import evaluate
from modlab.training.loop import TrainConfig, train
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.training import settings


def test_a_run_ends_calibrated(make: Callable[..., Any], rows: torch.Tensor) -> None:
    """The penalty alone has not got there in so few steps; the thresholds are moved."""
    ends = []
    for calibrated in (False, True):
        model = make(mod=alternate_layers())
        scatter_gates(model)
        config = settings(steps=6, keep_ratio=0.3, calibrate=calibrated)
        ends.append(
            train(model, rows, TrainConfig(**config), eval_data=rows).history["eval_keep_ratio"].iloc[-1]
        )
        assert set(model.mod.thresholds.values()) == {0.5}  # the gates moved
    assert abs(ends[0] - 0.3) > 0.05 and ends[1] == pytest.approx(0.3, abs=0.02)


def test_each_layer_is_calibrated_where_each_has_to_keep_the_share(
    make: Callable[..., Any], rows: torch.Tensor
) -> None:
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2, 3]))
    scatter_gates(model)
    config = settings(steps=6, lr=1e-6, keep_ratio=0.4, per_layer=True, calibrate=True)
    train(model, rows, TrainConfig(**config))
    found = evaluate(model, rows, batch_size=8)
    assert [found.keep_ratio_by_layer[i] for i in (1, 2, 3)] == pytest.approx([0.4] * 3, abs=0.05)


def test_thresholds_of_their_own_keep_their_distance(make: Callable[..., Any], rows: torch.Tensor) -> None:
    """Calibrated, all layers move by one amount: what one keeps compared with the others was trained."""
    thresholds = {1: 0.4, 2: 0.6}
    model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2], p=thresholds))
    scatter_gates(model)
    biases = [model.model.layers[i].mod_router.bias.item() for i in (1, 2)]
    train(model, rows, TrainConfig(**settings(steps=1, lr=1e-9, keep_ratio=0.3, calibrate=True)))
    moved = [model.model.layers[i].mod_router.bias.item() for i in (1, 2)]
    assert moved[0] - biases[0] == pytest.approx(moved[1] - biases[1], abs=1e-4)
    assert abs(moved[0] - biases[0]) > 0.1 and model.mod.thresholds == thresholds
    assert evaluate(model, rows, batch_size=8).keep_ratio == pytest.approx(0.3, abs=0.03)


def test_an_interrupt_while_calibrating_keeps_the_run(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modlab.training.calibration.calibrate", interrupted)
    model = make(mod=alternate_layers())
    scatter_gates(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("router.bias")}
    with pytest.warns(UserWarning, match="thresholds stay as trained: KeyboardInterrupt"):
        train(model, rows, TrainConfig(out=tmp_path / "run", **settings(steps=1, lr=1e-9, calibrate=True)))
    assert (tmp_path / "run" / "model" / "config.json").exists()
    after = dict(model.named_parameters())
    assert all(torch.allclose(after[n], bias, atol=1e-5) for n, bias in before.items())


def test_gates_that_enter_the_output_are_not_moved(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers(gate="fused"))
    scatter_gates(model)
    config = settings(steps=6, lr=1e-6, keep_ratio=0.3, calibrate=True)
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("router.bias")}
    history = train(model, rows, TrainConfig(**config), eval_data=rows).history
    assert history["eval_keep_ratio"].iloc[-1] == pytest.approx(0.3, abs=0.02)
    assert set(model.mod.thresholds.values()) != {0.5}
    assert all(torch.allclose(p, biases[n], atol=1e-3) for n, p in model.named_parameters() if n in biases)


def test_gates_that_cannot_be_split_stay(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=alternate_layers())
    with pytest.warns(UserWarning, match="(?s)thresholds stay as trained.*all alike"):
        train(model, rows, TrainConfig(**settings(steps=1, lr=1e-9, keep_ratio=0.3, calibrate=True)))
    assert set(model.mod.thresholds.values()) == {0.5}
