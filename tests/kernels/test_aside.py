"""Work on a stream aside: what a step that fails leaves to the next one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.engine import step_layers
from modlab.kernels import aside
from tests.helpers.fast_generation import llama_on_device, prompts


class Failed(Exception):
    pass


def test_a_step_that_fails_leaves_no_event_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_on_device(skip="kv")
    modlab.enable_fast_generation(model, compile=False)
    model.generate(**prompts(9), max_new_tokens=3)
    decide = step_layers.KeptKeysStep.decide

    def failing(*args: Any) -> None:
        decide(*args)
        aside._of_thread.pending = "an event of a capture"  # as `aside` leaves it, until `rejoin`
        raise Failed

    monkeypatch.setattr(step_layers.KeptKeysStep, "decide", failing)
    engine = model.__dict__["mod_engine"]
    engine.steps.clear()
    with pytest.raises(Failed):
        model.generate(**prompts(9), max_new_tokens=3)
    aside.rejoin(torch.device("cpu"))  # an event of this kind would be an error
    monkeypatch.undo()
    model.generate(**prompts(9), max_new_tokens=3)
