"""Prompts on guessed numbers of kept tokens compute what they would without, and wait once, at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.engine.guesses import Guesses, guessed_places
from modlab.engine.prefill import prefill
from modlab.errors import ModlabError
from tests.helpers.fast_generation import DEVICE, generated, llama_on_device, prompts
from tests.helpers.models import dense_llama, leaving_llama
from tests.helpers.waits import Waits

FORMS = [
    ("straight-through", "layer"), ("straight-through", "attention"), ("straight-through", "mlp"),
    ("paper", "layer"), ("paper", "attention"),
]  # fmt: skip


def guessing(model: Any, **settings: Any) -> Any:
    """The model's engine, which guesses from its second prompt on."""
    modlab.enable_fast_generation(model, compile=False)
    engine = model.__dict__["mod_engine"]
    engine.guesses = Guesses(**{"least": 8, "multiple": 4, "steady": 0, **settings})
    return engine


def facts(buffers: list[Any]) -> list[Any]:
    """What each layer stores, with its room."""
    said = []
    for buffer in buffers:
        (n,), (start,) = buffer.lengths, buffer.starts
        kept = [buffer.keys[:, start : start + n], buffer.values[:, start : start + n]]
        said.append((n, buffer.capacities, buffer.columns[start : start + n].tolist(), kept))
    return said


def same(got: list[Any], want: list[Any]) -> None:
    for (*one, tensors), (*other, expected) in zip(got, want, strict=True):
        assert one == other
        for tensor, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gate", "skip"), FORMS)
def test_a_guessed_prompt_stores_and_says_what_another_does(gate: str, skip: str) -> None:
    model, inputs = llama_on_device(gate=gate, skip=skip), prompts(60, seed=5)
    engine = guessing(model)
    want, stored, _ = prefill(engine, inputs["input_ids"], None)  # nothing is known yet
    with Waits() as waits:
        got, buffers, _ = prefill(engine, inputs["input_ids"], None)
    sizes = engine.guesses.of(60)
    assert sizes and (engine.guesses.right, engine.guesses.wrong) == (1, 0)
    assert waits.calls == {"tolist": 1 + len(model.mod.layers) - len(sizes)}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same(facts(buffers), facts(stored))


@pytest.mark.parametrize(("gate", "skip"), FORMS)
def test_more_kept_tokens_than_guessed_run_again(gate: str, skip: str) -> None:
    model, inputs = llama_on_device(gate=gate, skip=skip), prompts(60, seed=5)
    engine = guessing(model)
    want, stored, _ = prefill(engine, inputs["input_ids"], None)
    engine.guesses.latest[-1] = dict.fromkeys(engine.guesses.latest[-1], 0.01)
    got, buffers, _ = prefill(engine, inputs["input_ids"], None)
    assert (engine.guesses.right, engine.guesses.wrong) == (0, 1)
    assert torch.equal(got, want)
    same(facts(buffers), facts(stored))
    prefill(engine, inputs["input_ids"], None)
    assert (engine.guesses.right, engine.guesses.wrong) == (1, 1), "it has learned"


def override(share: float) -> Any:
    def keep(layer: int, gate: Tensor, positions: Tensor) -> Tensor:
        return (positions * 7919 + layer) % 100 < 100 * share

    return keep


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("before", [0.0, 0.3, 1.0])
def test_empty_and_full_layers(before: float, share: float) -> None:
    """After any other: nothing kept, some, everything."""
    model, inputs = llama_on_device(), prompts(60, seed=5)
    engine = guessing(model)
    with modlab.routing_override(model, override(share)):
        want, stored, _ = prefill(engine, inputs["input_ids"], None)
    with modlab.routing_override(model, override(before)):
        prefill(engine, inputs["input_ids"], None)
    with modlab.routing_override(model, override(share)):
        got, buffers, _ = prefill(engine, inputs["input_ids"], None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same(facts(buffers), facts(stored))


def test_tokens_are_the_same_with_padding_and_rows_next_to_each_other() -> None:
    """Through `generate`, other prompts in between; of several rows nothing is guessed."""
    model = llama_on_device()
    batches = [prompts(60), prompts(50, seed=1), prompts(40, 30), prompts(60, seed=2), prompts(5)]
    want = [generated(model, batch) for batch in batches]
    engine = guessing(model)
    assert [generated(model, batch) for batch in batches] == want
    assert engine.guesses.right + engine.guesses.wrong >= 2


def test_by_default_nothing_is_guessed() -> None:
    model, inputs = llama_on_device(), prompts(60)
    modlab.enable_fast_generation(model, compile=False)
    engine = model.__dict__["mod_engine"]
    for _ in range(2):
        with Waits() as waits:
            prefill(engine, inputs["input_ids"], None)
        assert engine.guesses is None and waits.calls == {"tolist": len(model.mod.layers)}
    assert modlab.fast_generation_report(model)["guessed"] is None


def test_prompts_of_a_call_run_on_guesses_where_that_is_asked_for() -> None:
    model = llama_on_device()
    modlab.enable_fast_generation(model, compile=False, guess=True)
    inputs = prompts(512)
    want = generated(model, inputs)
    steady = model.__dict__["mod_engine"].guesses.steady
    for runs in range(steady + 2):
        assert modlab.fast_generation_report(model)["guessed"] == {"right": max(runs - steady, 0), "wrong": 0}
        assert generated(model, inputs) == want


@pytest.mark.parametrize(
    "make",
    [dense_llama, lambda: leaving_llama("prompt"), lambda: llama_on_device(skip="kv")],
    ids=["dense", "prompt", "kv"],
)
def test_models_whose_prompts_run_all_tokens_have_nothing_to_guess(make: Callable[[], Any]) -> None:
    with pytest.raises(ModlabError, match="Leave guess away"):
        modlab.enable_fast_generation(make(), compile=False, guess=True)


@pytest.mark.parametrize("skip", ["written", "sublayers"])
def test_guesses_are_refused_for_what_the_engine_has_no_form_of(skip: str) -> None:
    with pytest.raises(ModlabError, match=f"skip='{skip}' has no form in the engine yet.*Leave guess away"):
        modlab.enable_fast_generation(llama_on_device(skip=skip), compile=False, guess=True)


def test_a_prompt_runs_on_guesses_after_eight_that_would_have_been_right() -> None:
    """As docs/fast_generation.md says; the first prompt of all had no guess."""
    guesses, ran = Guesses(), []
    for kept in [400] * 10 + [4000] + [400] * 9:
        ran.append(bool(guesses.of(4096)))
        guesses.learn({1: kept}, 4096)
    assert ran == [False] * 9 + [True] * 2 + [False] * 8 + [True]


def test_guesses_are_multiples_above_the_largest_share_before() -> None:
    guesses = Guesses(multiple=64, least=100, most=2000, steady=0)
    assert guesses.of(1000) == {}
    guesses.learn({1: 100, 3: 0, 5: 990}, 1000)
    assert guesses.of(1000) == {1: 128, 3: 64}  # of layer 5 everything may be kept
    assert guesses.of(2000) == {1: 256, 3: 64}
    assert guesses.of(99) == {} == guesses.of(2001)
    guesses.learn({1: 9000}, 9000)
    assert guesses.of(1000) == {1: 128, 3: 64}, "a prompt of another kind"
    guesses = Guesses(multiple=1, least=1, room=1.0, steady=2)
    for kept in (30, 10, 10, 20):
        guesses.learn({1: kept}, 100)
    assert list(guesses.latest) == [{1: 0.1}, {1: 0.2}]
    guesses.learn({1: 15}, 100)
    guesses.learn({1: 15}, 100)
    assert guesses.of(200) == {1: 30}


def test_a_prompt_runs_on_guesses_after_so_many_that_they_would_have_been_right_for() -> None:
    guesses, kept = Guesses(multiple=1, least=1, steady=3), {1: 40}
    for _ in range(1 + guesses.steady):  # the first one teaches, three are foreseen
        assert guesses.of(100) == {}
        guesses.learn(kept, 100)
    assert guesses.of(100) == {1: 50}
    guesses.learn({1: 51}, 100)
    for _ in range(guesses.steady):
        assert guesses.of(100) == {}, "one that was not foreseen, and all begins again"
        guesses.learn(kept, 100)
    assert guesses.of(100)


def test_places_are_kept_tokens_then_one_that_is_skipped() -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool, device=DEVICE)
    places, real = guessed_places(keep, 5)
    assert places[:3].tolist() == [0, 2, 3] and real.tolist() == [True] * 3 + [False] * 2
    assert len(set(places[3:].tolist())) == 1 and not keep[places[3:]].any()
    assert guessed_places(keep, 2)[0].tolist() == [0, 2] and bool(guessed_places(keep, 2)[1].all())
