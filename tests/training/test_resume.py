"""Resuming: exact, or refused with what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.training.loop import TrainConfig, train
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.training import same_weights, settings


@pytest.mark.parametrize("kind", ["dense", "mod", "accumulated"])
def test_resume_is_exact(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, kind: str) -> None:
    """10 steps = 5 + 5 from a checkpoint, bit for bit, with dropout and a log window across the
    checkpoint."""
    more = {
        "dense": {},
        "mod": {"keep_ratio": 0.4, "what_if": 0.5, "router_lr": 1e-2, "ramp": 0.5},
        "accumulated": {"grad_accum": 2, "batch_size": 4},
    }[kind]
    mod = alternate_layers(init_gate=0.6) if kind == "mod" else None
    config = settings(save_every=5, log_every=2, **more)
    whole = train(make(mod=mod, attention_dropout=0.2), rows, TrainConfig(out=tmp_path / "whole", **config))

    short = TrainConfig(out=tmp_path / "cut", **config | {"max_minutes": 1e-9})
    cut = train(make(mod=mod, attention_dropout=0.2), rows, short)
    assert (cut.stopped, cut.steps) == ("time", 1)
    middle = make(seed=7, mod=mod, attention_dropout=0.2)
    path = tmp_path / "whole" / "checkpoints" / "step_5"
    resumed = train(middle, rows, TrainConfig(out=tmp_path / "again", resume=path, **config))
    other = make(seed=8, mod=mod, attention_dropout=0.2)
    last = train(other, rows, TrainConfig(out=tmp_path / "cut", resume="auto", **config))

    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.model, last.model)
    keys = [c for c in whole.history if c not in ("tokens_per_s", "seconds")]
    assert last.history[keys].equals(whole.history[keys])
    assert resumed.history[keys].equals(whole.history[keys].iloc[2:].reset_index(drop=True))


def test_finished_run_resumes_to_itself_and_can_be_extended(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    config = settings(steps=4, save_every=2)
    first = train(make(), rows, TrainConfig(out=tmp_path / "run", **config))
    again = train(make(seed=3), rows, TrainConfig(out=tmp_path / "run", resume="auto", **config))
    assert same_weights(first.model, again.model)
    assert again.history.equals(first.history)
    longer = train(
        make(seed=4), rows, TrainConfig(out=tmp_path / "run", resume="auto", **config | {"steps": 6})
    )
    assert longer.history["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_finished_budget_run_resumes_to_itself(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    config = settings(steps=13, objective="budget", keep_ratio=0.4, ramp=0.0, log_every=10, save_every=13)
    found = []
    for _ in range(2):
        model = make(mod=modlab.MoDConfig(skip="layer", layers=[1, 2]))
        scatter_gates(model)
        train(model, rows, TrainConfig(out=tmp_path / "run", resume="auto", **config))
        saved = json.loads((tmp_path / "run" / "model" / "modlab_config.json").read_text())
        found.append((dict(model.mod.thresholds), saved))
    assert found[0] == found[1]
    assert set(found[0][0].values()) != {0.5}


def test_a_calibrated_run_resumes_to_itself_and_goes_on_from_what_was_trained(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    def run(out: str, steps: int, model: Any) -> Any:
        config = settings(steps=steps, keep_ratio=0.5, calibrate=True, save_every=3, ramp=0.0, warmup=0.0)
        config |= {"min_lr_ratio": 1.0, "out": tmp_path / out, "resume": "auto"}
        return train(model, rows, TrainConfig(**config)).model

    def fresh() -> Any:
        model = make(mod=alternate_layers())
        scatter_gates(model)
        return model

    first = run("a", 6, fresh())
    assert same_weights(run("a", 6, fresh()), first)  # nothing left to train: calibrated again
    assert same_weights(run("a", 9, fresh()), run("b", 9, fresh()))


def test_refuses_a_folder_that_is_taken(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make(), rows, TrainConfig(out=out, **settings(steps=2, save_every=1)))
    log = (out / "log.jsonl").read_text()
    with pytest.raises(ModlabError, match="already holds a run.*resume='auto'"):
        train(make(), rows, TrainConfig(out=out, **settings(steps=2)))
    with pytest.raises(ModlabError, match=r"seed=1 \(was 0\)"):
        train(make(), rows, TrainConfig(out=out, resume="auto", **settings(steps=4, seed=1)))
    with pytest.raises(ModlabError, match="no folder"):
        train(make(), rows, TrainConfig(out=out, resume=out / "step_99", **settings(steps=4)))
    with pytest.raises(ModlabError, match="belongs to another model"):
        train(make(hidden_size=16), rows, TrainConfig(out=out, resume="auto", **settings(steps=4)))
    assert (out / "log.jsonl").read_text() == log
    (tmp_path / "file").write_text("")
    with pytest.raises(ModlabError, match="is a file"):
        train(make(), rows, TrainConfig(out=tmp_path / "file", **settings()))
