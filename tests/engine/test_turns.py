"""A model with fast generation in several threads, called from inside itself, in training mode: each call
gets what it gets alone.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import modlab
from modlab.engine.turns import Turns
from modlab.errors import ModlabError
from modlab.hf.anatomy import decoder_of
from tests.helpers.fast_generation import DEVICE, generated, llama_on_device, prompts
from tests.helpers.models import dense_llama

MODELS: dict[str, Callable[[], Any]] = {
    "dense": lambda: dense_llama().to(DEVICE),
    "paper": lambda: llama_on_device(gate="paper"),
    **{skip: lambda skip=skip: llama_on_device(skip=skip) for skip in ("layer", "attention", "mlp", "kv")},
}
WAIT = 60.0
"""Seconds after which a test that hangs fails; none of them gets near it."""


class Stopping(BaseStreamer):
    """Stops the generation after some tokens, until it is told to go on; notes its end in `order`."""

    def __init__(self, order: list[str], after: int = 4) -> None:
        self.order = order
        self.reached, self.go_on, self.left = threading.Event(), threading.Event(), after

    def put(self, value: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.go_on.wait(WAIT)

    def end(self) -> None:
        self.order.append("generation")


# Turns alone


def test_forwards_do_not_wait_for_each_other() -> None:
    turns = Turns()
    with turns.forward(), turns.forward():
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: entered(turns.forward())).result(WAIT)
        with turns.generation() as why:
            assert "another forward" in why


def entered(context: Any) -> bool:
    with context:
        return True


def test_a_forward_of_another_thread_waits_and_ones_own_does_not() -> None:
    turns, order = Turns(), []

    def forward() -> None:
        with turns.forward():
            order.append("forward")

    with turns.generation() as why:
        assert why == ""
        with turns.forward():
            order.append("own forward")
        with turns.generation() as inner:
            assert "inside another generation" in inner
        thread = threading.Thread(target=forward)
        thread.start()
        order.append("generation")
    thread.join(WAIT)
    assert order == ["own forward", "generation", "forward"]


def test_turns_end_with_an_error() -> None:
    turns = Turns()
    for turn in (turns.forward, turns.generation):
        with pytest.raises(KeyboardInterrupt), turn():
            raise KeyboardInterrupt
    with turns.generation() as why:
        assert why == ""


# Models


@pytest.mark.parametrize("called", ["model", "decoder"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_during_a_generation_is_right(name: str, called: str) -> None:
    model, inputs, other = MODELS[name](), prompts(9, 6), prompts(12, seed=1)
    module = model if called == "model" else decoder_of(model)
    want, want_tokens = outputs(module, other), generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    order: list[str] = []
    streamer = Stopping(order)

    def forward() -> Tensor:
        out = outputs(module, other)
        order.append("forward")
        return out

    with ThreadPoolExecutor(2) as pool:
        tokens = pool.submit(generated, model, one_row(inputs), streamer=streamer)
        assert streamer.reached.wait(WAIT)
        got = pool.submit(forward)
        streamer.go_on.set()
        assert len(tokens.result(WAIT)) == 1
        torch.testing.assert_close(got.result(WAIT), want)
    assert order == ["generation", "forward"]
    assert generated(model, inputs) == want_tokens


def one_row(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in inputs.items()}


@torch.no_grad()
def outputs(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(**inputs, use_cache=False)[0]


@pytest.mark.parametrize("name", ["dense", "kv", "attention"])
def test_a_generation_during_a_forward_runs_without_the_engine(name: str) -> None:
    model, inputs, other = MODELS[name](), prompts(9, 6), prompts(12, seed=1)
    want, want_tokens = outputs(model, other), generated(model, inputs)
    modlab.enable_fast_generation(model, compile=False)
    reached, go_on, mine = threading.Event(), threading.Event(), threading.get_ident()

    def stop(_module: Any, _args: Any, _output: Any) -> None:
        if threading.get_ident() != mine:
            reached.set()
            assert go_on.wait(WAIT)

    hook = model.get_input_embeddings().register_forward_hook(stop)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(outputs, model, other)
        assert reached.wait(WAIT)
        tokens = generated(model, inputs)
        why = modlab.fast_generation_report(model)["last"]["why"]
        go_on.set()
        torch.testing.assert_close(got.result(WAIT), want)
    hook.remove()
    assert tokens == want_tokens and "another forward" in why
    generated(model, inputs)
    assert modlab.fast_generation_report(model)["last"]["fast"]


@pytest.mark.parametrize("name", MODELS)
def test_threads_that_generate_and_compute_at_once(name: str) -> None:
    model = MODELS[name]()
    batches = [prompts(9, 6, seed=seed) for seed in range(3)]
    want = [(generated(model, batch, max_new_tokens=10), outputs(model, batch)) for batch in batches]
    modlab.enable_fast_generation(model, compile=False)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            tokens = [pool.submit(generated, model, batch, max_new_tokens=10) for batch in batches]
            logits = [pool.submit(outputs, model, batch) for batch in batches]
            for (want_tokens, want_logits), got, computed in zip(want, tokens, logits, strict=True):
                assert got.result(WAIT) == want_tokens
                torch.testing.assert_close(computed.result(WAIT), want_logits)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("name", ["dense", "layer", "kv"])
def test_a_callback_that_uses_the_model(name: str) -> None:
    """A logits processor that runs the model (as guidance does), and one that generates with it."""
    model, inputs, other = MODELS[name](), prompts(9, 6), prompts(7, 4, seed=1)

    def guided(_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + outputs(model, other)[:, -1]

    def nested(_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = model.generate(**other, max_new_tokens=3, do_sample=False, eos_token_id=None)
        return scores.scatter(1, tokens[:, -1:], float(scores.max()) + 1)

    settings = {"max_new_tokens": 6, "eos_token_id": None}
    want = [generated(model, inputs, logits_processor=[call], **settings) for call in (guided, nested)]
    modlab.enable_fast_generation(model, compile=False)
    got = [generated(model, inputs, logits_processor=[call], **settings) for call in (guided, nested)]
    assert got == want
    assert modlab.fast_generation_report(model)["last"]["rows"] == 2, "the outer one was fast"


@pytest.mark.parametrize("what_if", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_generation_in_training_mode(name: str, what_if: bool) -> None:
    """As without fast generation, and the same tokens as in eval mode: nothing is dropped out here."""
    model, inputs = MODELS[name](), prompts(9, 6)
    want = generated(model, inputs, max_new_tokens=12)
    if name != "dense":
        model.mod.what_if = what_if
    modlab.enable_fast_generation(model, compile=False)
    assert generated(model.train(), inputs, max_new_tokens=12) == want
    assert all(module.training for module in model.modules())
    assert "training mode" in modlab.fast_generation_report(model)["last"]["why"]
    assert generated(model.eval(), inputs, max_new_tokens=12) == want
    assert modlab.fast_generation_report(model)["last"]["fast"]


def test_a_part_in_training_mode_goes_without_the_engine() -> None:
    """And switching on leaves every part in its own mode."""
    model, inputs = llama_on_device(), prompts(9)
    model.model.layers[2].train()
    modes = [module.training for module in model.modules()]
    modlab.enable_fast_generation(model, compile=False)
    assert [module.training for module in model.modules()] == modes
    generated(model, inputs, max_new_tokens=3)
    assert "a part of it" in modlab.fast_generation_report(model)["last"]["why"]


def test_switching_off_gives_the_decoder_back() -> None:
    model = llama_on_device()
    decoder = decoder_of(model)
    before, keys = type(decoder), set(decoder.__dict__)
    modlab.enable_fast_generation(model, compile=False)
    assert type(decoder).__qualname__ == before.__qualname__
    with pytest.raises(ModlabError, match="disable_fast_generation"):
        copy.deepcopy(decoder)
    modlab.disable_fast_generation(model)
    assert type(decoder) is before and set(decoder.__dict__) == keys
    copy.deepcopy(decoder)
