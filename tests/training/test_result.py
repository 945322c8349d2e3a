"""What a run leaves shows itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from modlab.errors import ModlabError
from modlab.training.folder import RunFolder
from modlab.training.loop import TrainConfig, train
from modlab.training.result import TrainResult
from tests.helpers.models import alternate_layers
from tests.helpers.training import settings


def test_result_shows_itself(make: Callable[..., Any], rows: torch.Tensor) -> None:
    result = train(make(mod=alternate_layers()), rows, TrainConfig(**settings(steps=3)), eval_data=rows[:8])
    figure = result.plot()
    assert {t.name for t in figure.data} == {"loss", "eval_loss", "keep_ratio", "keep_1", "keep_3", "target"}
    assert len(figure.data[0].x) == 3
    dense = train(make(), rows, TrainConfig(**settings(steps=2)))
    assert [t.name for t in dense.plot().data] == ["loss"]
    assert "2 steps" in dense._repr_html_() and "<table" in dense._repr_html_()


def test_a_result_says_where_it_is(make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path) -> None:
    result = train(make(), rows, TrainConfig(out=tmp_path / "run", **settings(steps=1)))
    assert result.kept_in == f"Saved in {tmp_path / 'run' / 'model'}."
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    in_memory = train(make(), rows, TrainConfig(**settings(steps=1))).kept_in
    assert in_memory.startswith("Not saved yet: model.save_pretrained(")


def test_names_and_paths_are_text_not_markup(
    make: Callable[..., Any], rows: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "<img src=x onerror=alert(1)>&run"
    page = train(make(), rows, TrainConfig(out=out, **settings(steps=1)))._repr_html_()
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;run" in page


def test_figures_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    """An infinite loss is a figure like others: no page is blank for it, and a log is JSON."""
    rows = [
        {"step": 1, "tokens": 8, "loss": 2.0, "eval_loss": math.inf, "keep_ratio": 1.0},
        {"step": 2, "tokens": 16, "loss": math.inf, "eval_loss": math.nan, "keep_ratio": 0.5},
    ]
    result = TrainResult(pd.DataFrame(rows), None, None, 2, 16, 1.0)
    assert "inf" in result._repr_html_()
    figure = result.plot()
    assert [len(trace.x) for trace in figure.data] == [1, 0, 2]
    json.loads(figure.to_json(), parse_constant=lambda name: pytest.fail(name))
    folder = RunFolder(tmp_path, is_main=True)
    folder.write_log(rows)
    folder.add_row(rows[0] | {"step": 3})
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    again = folder.begin({}, 3, steps_ahead=True)
    assert [row["step"] for row in again] == [1, 2, 3] and again[0]["eval_loss"] == math.inf


def test_an_infinite_loss_ends_a_run_that_says_so(make: Callable[..., Any], rows: torch.Tensor) -> None:
    model = make()
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
    with pytest.raises(ModlabError, match="not finite at or before step 1.*lower lr"):
        train(model, rows, TrainConfig(**settings(steps=3)))
