"""What belongs to a forward is its thread's: two threads on one model take nothing from each other, and
nothing that is installed outlives its block."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import modlab
from modlab.measure import evaluate
from modlab.routing.state import masked_execution, thresholds_restored
from tests.helpers.models import routed_llama

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
ROUNDS = 12


def together(*works: Callable[[], Any]) -> list[list[Any]]:
    """What each of `works` returns in `ROUNDS` rounds, each in a thread of its own, all at once."""
    results: list[list[Any]] = [[] for _ in works]
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], Any], into: list[Any]) -> None:
        try:
            begin.wait()
            for _ in range(ROUNDS):
                into.append(work())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(works, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def even(layer: int, gate: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return position % 2 == 0


def none(layer: int, gate: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(gate, dtype=torch.bool)


@pytest.mark.parametrize("skip", ["layer", "kv"])
def test_overrides_and_recordings_are_their_thread_s(make_llama: Any, skip: str) -> None:
    model = modlab.convert(make_llama(), modlab.MoDConfig(skip=skip, layers="all", keep_recent=3))

    def forced(fn: Any) -> Any:
        with torch.no_grad(), modlab.routing_override(model, fn), modlab.record_routing(model) as recording:
            logits = model(IDS, use_cache=False).logits
        (step,) = recording.steps
        return logits, step.keep[2]

    def plain() -> Any:
        with torch.no_grad():
            return model(IDS, use_cache=False).logits, None

    def masked() -> Any:
        with torch.no_grad(), modlab.routing_override(model, even), masked_execution(model):
            return model(IDS, use_cache=False).logits, None

    works = [lambda: forced(even), lambda: forced(none), plain, masked]
    alone = [work() for work in works]
    for want, got in zip(alone, together(*works), strict=True):
        for logits, keep in got:
            torch.testing.assert_close(logits, want[0])
            assert keep is None or torch.equal(keep, want[1])
    assert model.mod.override is None and not model.mod.masked and not model.mod.of_thread.recordings


def test_generation_and_a_measurement_at_the_same_time(routed_model: Any) -> None:
    def generate() -> Any:
        return routed_model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)

    def measure() -> Any:
        return evaluate(routed_model, [{"input_ids": IDS[:1]}]).loss

    want = generate(), measure()
    tokens, losses = together(generate, measure)
    assert all(torch.equal(t, want[0]) for t in tokens) and losses == [want[1]] * ROUNDS


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another thread"])
def test_a_generation_ends_with_the_recent_tokens_that_it_began_with(fast: bool, elsewhere: bool) -> None:
    """A slider that is moved meanwhile is for the next one."""
    model = routed_llama(skip="kv", keep_recent=4)
    if fast:
        modlab.enable_fast_generation(model, compile=False, check=False)
    seen: list[int] = []

    def move(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(model.mod.config.keep_recent)
        work = threading.Thread(target=modlab.set_keep_recent, args=(model, 1 + len(seen)))
        work.start() if elsewhere else work.run()
        if elsewhere:
            work.join()
        return scores

    def generate(**kwargs: Any) -> Any:
        return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, **kwargs)

    want = generate()
    modlab.set_keep_recent(model, 9)
    other = generate()
    assert not torch.equal(want, other), "the number of recent tokens should matter"
    modlab.set_keep_recent(model, 4)
    assert torch.equal(generate(logits_processor=[move]), want)
    assert len(seen) == 12 and set(seen) == {4}
    assert model.mod.config.keep_recent == 13  # what was said last holds afterwards
    modlab.set_keep_recent(model, 9)
    assert torch.equal(generate(), other)


def test_a_measurement_inside_a_generation_has_recent_tokens_of_its_own() -> None:
    model = routed_llama(skip="kv", keep_recent=4)
    seen: list[int] = []

    def measure(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with thresholds_restored(model):
            modlab.set_keep_recent(model, 9)
            seen.append(model.mod.config.keep_recent)
        seen.append(model.mod.config.keep_recent)
        return scores

    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0, logits_processor=[measure])
    assert seen == [9, 4] * 2 and model.mod.config.keep_recent == 4


def test_an_interrupted_forward_leaves_nothing_behind(routed_model: Any) -> None:
    with torch.no_grad():
        want = routed_model(IDS, use_cache=False).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = routed_model.model.layers[3].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        with modlab.routing_override(routed_model, none), modlab.record_routing(routed_model):
            with masked_execution(routed_model):
                routed_model(IDS, use_cache=False)
    hook.remove()
    routing = routed_model.mod
    assert routing.override is None and not routing.masked and not routing.of_thread.recordings
    with torch.no_grad(), modlab.record_routing(routed_model) as recording:
        assert torch.equal(routed_model(IDS, use_cache=False).logits, want)
    assert len(recording.steps) == 1


def test_a_copy_begins_without_its_original_s_forward(routed_model: Any) -> None:
    with modlab.routing_override(routed_model, even):
        for twin in (copy.deepcopy(routed_model), pickle.loads(pickle.dumps(routed_model))):
            assert twin.mod.override is None and twin.mod.call is None
            assert twin.model.layers[1].mod_plan.routing is twin.mod
