"""The quick walk finds what torch's own finds."""

from __future__ import annotations

from torch import nn

from modlab.hf.parts import parts
from tests.helpers.models import dense_llama


def test_the_same_modules_as_torchs_own_walk() -> None:
    model = dense_llama()
    found = parts(model)
    assert len(found) == len(set(map(id, found)))
    assert set(map(id, found)) == set(map(id, model.modules()))


def test_shared_and_missing_children_and_circles() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Module()
    model.left, model.right, model.none = nn.Sequential(shared), nn.Sequential(shared), None
    shared.add_module("owner", model)  # a child that holds its parent, as some adapters do
    found = parts(model)
    assert found[0] is model
    assert set(map(id, found)) == set(map(id, model.modules()))
    assert len(found) == 4
