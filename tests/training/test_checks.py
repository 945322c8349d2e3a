"""Refusals that need the model or the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from modlab.training.loop import TrainConfig, train
from modlab.training.step import BARREN_STEPS
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.training import settings


@pytest.mark.parametrize(
    ("mod", "config", "message"),
    [
        (alternate_layers(), {"objective": "bce"}, "does not fit threshold"),
        (modlab.MoDConfig.topk(), {"objective": "target"}, "does not fit topk"),
    ],
)
def test_refuses_settings_of_another_routing(
    make: Callable[..., Any], rows: torch.Tensor, mod: modlab.MoDConfig, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModlabError, match=message):
        train(make(mod=mod), rows, TrainConfig(**settings(**config)))


def test_refuses_data_that_does_not_fit(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model, config = make(), TrainConfig(**settings())
    for data, message in (
        (rows.repeat(1, 2), "rows of 64 tokens, but the model's context is 32"),
        (rows + 1, "ids from 1 to 64, but the model has 64 tokens"),
        (rows[:, :1], "rows of one token"),
        (rows[:0], "empty"),
        ([rows[:8], rows.repeat(1, 2)[:8]], "context is 32"),  # met in step 2
    ):
        with pytest.raises(ModlabError, match=message):
            train(model, data, config)
    with pytest.raises(ModlabError, match="eval_data holds token ids"):
        train(model, rows, config, eval_data=rows + 1)


def test_refuses_data_without_a_token_to_predict(make: Callable[..., Any], rows: torch.Tensor) -> None:
    padding, ignored = torch.zeros_like(rows), torch.full_like(rows, -100)
    config = TrainConfig(**settings(steps=1))
    by_row = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(rows, padding, strict=True)]
    for data in (
        {"input_ids": rows, "attention_mask": padding},
        {"input_ids": rows, "labels": ignored},
        {"input_ids": rows[:0]},
        [{"input_ids": rows, "labels": ignored}] * 3,
        by_row,
    ):
        with pytest.raises(ModlabError, match="batches has no token to predict"):
            train(make(), data, config)
    with pytest.raises(ModlabError, match="eval_data has no token to predict"):
        train(make(), rows, config, eval_data={"input_ids": rows, "labels": ignored})
    some = [{"input_ids": rows, "labels": ignored}, {"input_ids": rows}]
    train(make(), some, TrainConfig(**settings(steps=2)))


@pytest.mark.parametrize("nothing", ["labels", "attention_mask"])
def test_a_stream_without_a_token_to_predict_ends_the_run(
    nothing: str, make: Callable[..., Any], rows: torch.Tensor
) -> None:
    """Its first batches alone may hold prompts; as many as all of a short run, or of eight steps, may not."""
    empty = torch.full_like(rows, -100) if nothing == "labels" else torch.zeros_like(rows)
    barren, full = {"input_ids": rows, nothing: empty}, {"input_ids": rows}

    def stream(before: int) -> Any:
        yield from [barren] * before
        while before < BARREN_STEPS:
            yield full

    for steps, before, seen in ((3, 9, 3), (12, 12, BARREN_STEPS)):
        with pytest.raises(ModlabError, match=f"first {seen} steps have no token to predict"):
            train(make(), stream(before), TrainConfig(**settings(steps=steps)))
    assert train(make(), stream(2), TrainConfig(**settings(steps=4))).steps == 4


@pytest.mark.parametrize(
    "given",
    [
        {"keep_ratio": 0.5},
        {"keep_range": (0.2, 0.8), "objective": "distil"},
        {"lam": 1.0},
        {"ramp": 0.7},
        {"router_lr": 0.1},
        {"what_if": 0.0, "objective": "none"},
    ],
)
def test_refuses_settings_of_gates_where_none_decides(
    make: Callable[..., Any], rows: torch.Tensor, given: dict[str, Any]
) -> None:
    config = TrainConfig(**{"steps": 1, "batch_size": 4, **given})
    with pytest.raises(ModlabError, match=f"^{next(iter(given))}=.*'prompt', where no gate decides"):
        train(make(mod=modlab.MoDConfig(skip="prompt")), rows, config)


@pytest.mark.parametrize("keep_range", [None, (0.1, 0.8)])
def test_refuses_to_shut_the_gates_of_fresh_routers_at_once(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path, keep_range: tuple[float, float] | None
) -> None:
    """Nothing is written. A hold, a ramp, a checkpoint or routers that know something make it possible."""
    mod = modlab.MoDConfig(layers="all", keep_recent=4, router_hidden=2)
    given = settings(steps=2, objective="distil", keep_ratio=0.3, keep_range=keep_range, ramp=0.0)
    out = tmp_path / "run"
    lowest = 0.3 if keep_range is None else 0.1
    with pytest.raises(
        ModlabError,
        match=rf"ramp=0 begins at a keep ratio of {lowest}, .*of all layers are fresh.*start_from",
    ):
        train(make(mod=mod), rows, TrainConfig(out=out, **given))
    assert not out.exists()
    half = scatter_gates(make(mod=mod))
    with torch.no_grad():
        half.model.layers[2].mod_router.weight.zero_()
    with pytest.raises(ModlabError, match=r"the routers of layers \[2\] are fresh"):
        train(half, rows, TrainConfig(**given))
    train(make(mod=mod), rows, TrainConfig(**given | {"hold": 0.5}))
    train(scatter_gates(make(mod=mod)), rows, TrainConfig(**given))
    train(make(mod=mod), rows, TrainConfig(out=out, **given | {"ramp": 0.5, "save_every": 2}))
    longer = TrainConfig(out=out, resume="auto", **given | {"steps": 3})
    assert train(make(mod=mod), rows, longer).steps == 3


def test_refuses_to_freeze_routers_that_know_nothing_or_have_nothing_above(
    make: Callable[..., Any], rows: torch.Tensor
) -> None:
    config = TrainConfig(**settings(steps=1, objective="distil", keep_ratio=0.5, freeze_below=True))
    mod = modlab.MoDConfig(skip="kv+prompt", layers="all", keep_recent=4, leave_after=0.5)
    with pytest.raises(ModlabError, match=r"freeze_below=True leaves .* those of layers \[0, 1.*start_from"):
        train(make(mod=mod), rows, config)
    train(scatter_gates(make(mod=mod)), rows, config)
    with pytest.raises(ModlabError, match="with skip='kv' no prompt token leaves"):
        train(scatter_gates(make(mod=modlab.MoDConfig(keep_recent=4))), rows, config)


def test_refuses_rows_in_which_every_key_is_recent(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make(mod=modlab.MoDConfig(keep_recent=rows.shape[1]))
    with pytest.raises(ModlabError, match=f"rows of at most {rows.shape[1]} tokens.*keep_recent"):
        train(model, rows, TrainConfig(**settings(steps=1)))
    model.mod.config.keep_recent -= model.mod.config.keep_first + 2
    train(model, rows, TrainConfig(**settings(steps=1)))


def test_refuses_unsuitable_teachers(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make()
    for teacher, kl, message in (
        (make(), 0.0, "kl=0"),
        (model, 1.0, "the model itself"),
        (make(mod=alternate_layers()), 1.0, "teacher is converted"),
        (make(vocab_size=80), 1.0, "80 tokens"),
    ):
        with pytest.raises(ModlabError, match=message):
            train(model, rows, TrainConfig(**settings(kl=kl)), teacher=teacher)
