"""Uninitialised memory is poisoned in every test: see `helpers/poison.py`."""

from __future__ import annotations

import pytest
import torch

from modlab.cache.layer import RaggedLayer

FLOATS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: torch.empty(2, 3, **kw),
        lambda **kw: torch.empty_like(FLOATS, **kw),
        lambda **kw: torch.empty_strided((2, 3), (1, 2), **kw),
        lambda **kw: FLOATS.new_empty(2, 3, **kw),
        lambda **kw: FLOATS.new_empty_strided((2, 3), (1, 2), **kw),
    ],
    ids=["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"],
)
def test_every_way_to_ask_for_it(make) -> None:
    assert make().isnan().all()
    assert make(dtype=torch.bfloat16).isnan().all()
    assert (make(dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert make(dtype=torch.bool).all()


def test_parameters_and_meta_tensors_are_made_as_before() -> None:
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(2, device="meta").is_meta
    assert torch.nn.Linear(2, 2).weight.isfinite().all()
    with torch.inference_mode():
        assert torch.empty(2).isnan().all()


def test_the_slack_of_a_ragged_layer_is_poisoned() -> None:
    """The mechanism reaches what it is for."""
    layer, one = RaggedLayer(), torch.ones(1, 2, 3, 4)
    layer.update(one, one)
    layer.update(one, one)  # grows, and leaves room for more
    assert layer.keys.shape[1] > 6
    assert layer.keys[:, :6].isfinite().all() and layer.keys[:, 6:].isnan().all()
