"""What a run leaves shows itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modlab.training.loop import TrainConfig, train
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
