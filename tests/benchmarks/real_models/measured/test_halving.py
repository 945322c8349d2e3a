"""Batches that do not fit are halved, and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.real_models.measured.halving import halving


def test_every_item_runs_once_in_batches_that_fit() -> None:
    sizes = []

    def run(items: Sequence[int]) -> list[int]:
        if len(items) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(items))
        return list(items)

    assert [one for part in halving(range(11), 8, run) for one in part] == list(range(11))
    assert sizes == [2, 2, 2, 2, 2, 1]


def test_one_item_that_does_not_fit_is_an_error() -> None:
    def run(items: Sequence[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(halving([1, 2], 2, run))
