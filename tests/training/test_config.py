"""Settings that cannot work are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modlab.errors import ModlabError
from modlab.training.loop import TrainConfig, train
from tests.helpers.training import settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": None}, "How long to train"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -3}, "steps=-3"),
        ({"tokens": 100}, "give one of them"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"grad_accum": 0}, "grad_accum=0"),
        ({"seed": -1}, "seed=-1: give a whole number of at least 0"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"log_every": -1}, "log_every=-1"),
        ({"eval_every": -1}, "eval_every=-1"),
        ({"eval_batches": -2}, "eval_batches=-2"),
        ({"save_every": -1}, "save_every=-1"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
        ({"what_if": 1.5}, "what_if=1.5"),
        ({"objective": "budget", "keep_range": (0.3,)}, "two shares"),
        ({"hold": 0.9, "ramp": 0.2}, "more than the whole run"),
        ({"objective": "budget", "keep_range": (0.3, 0.5), "keep_ratio": 0.6}, "keep_ratio=0.6"),
        ({"keep_range": (0.3, 0.5), "keep_ratio": 0.4}, "needs objective='budget'"),
        ({"recent_range": (128, 1024)}, "needs objective='distil' and a keep_range"),
        ({"freeze_below": True}, "freeze_below=True needs objective='distil', not 'auto'"),
        ({"recent_range": (8, 4)}, "the first has to be the smaller"),
        ({"objective": "distil", "keep_range": (0.3, 0.5), "keep_ratio": 0.4, "batch_size": 1}, "two rows"),
        ({"objective": "magic"}, "objective='magic'"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"save_every": 5}, "need a folder"),
        ({"resume": "auto"}, "need a folder"),
        ({"objective": "load"}, "the model is dense"),
        ({"objective": "target"}, "the model is dense"),
        ({"freeze_base": True}, "the model is dense"),
        ({"kl": 1.0}, "needs a teacher"),
        ({"batch_size": 1000}, "fewer than a batch"),
    ],
)
def test_refuses_bad_settings(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model = make()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModlabError, match=message) as caught:
        train(model, rows, TrainConfig(**settings(**config)))
    assert str(caught.value).count("\n") < 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
