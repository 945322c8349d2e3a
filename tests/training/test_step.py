"""A step is over its whole global batch, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modlab.training.loop import TrainConfig, train
from tests.helpers.training import settings


def test_accumulation_equals_a_larger_batch(make: Callable[..., Any], rows: torch.Tensor) -> None:
    large = train(make(), rows, TrainConfig(**settings(steps=4)))
    small = train(make(), rows, TrainConfig(**settings(steps=4, batch_size=4, grad_accum=2)))
    for a, b in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert small.history["loss"].tolist() == pytest.approx(large.history["loss"].tolist(), rel=1e-4)
