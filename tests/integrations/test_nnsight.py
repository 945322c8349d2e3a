"""nnsight traces a converted model as any other, routers and gates included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from tests.helpers.models import routed_llama

nnsight = pytest.importorskip("nnsight")


@pytest.fixture(params=["kv", "layer"])
def model(request: pytest.FixtureRequest) -> Any:
    return routed_llama(skip=request.param)


IDS = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))


def traced(model: Any, tokenizer: Any) -> Any:
    return nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")


def test_what_it_reads_is_what_the_model_computes(model: Any, word_tokenizer: Any) -> None:
    with torch.no_grad(), modlab.record_routing(model) as recording:
        want = model(IDS, output_hidden_states=True)
    seen = traced(model, word_tokenizer)
    with seen.trace(IDS):
        logit = seen.model.layers[3].mod_router.output.save()  # in the order in which modules run
        hidden = seen.model.layers[3].output.save()
        logits = seen.lm_head.output.save()
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert torch.equal(logits, want.logits)
    assert torch.equal(hidden.reshape(1, 40, -1), want.hidden_states[4])
    assert torch.equal(logit.sigmoid(), recording.steps[0].gate[3])


def test_an_intervention_acts_as_a_hook_does(model: Any, word_tokenizer: Any) -> None:
    seen = traced(model, word_tokenizer)
    with seen.trace(IDS):
        seen.model.layers[2].mlp.output[:] = 0
        changed = seen.lm_head.output.save()
    hook = model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    with torch.no_grad():
        by_hook = model(IDS).logits
        hook.remove()
        untouched = model(IDS).logits
    assert torch.equal(changed, by_hook) and not torch.equal(changed, untouched)


def test_it_leaves_the_model_as_it_was(model: Any, word_tokenizer: Any) -> None:
    with torch.no_grad():
        before = model(IDS).logits
    with traced(model, word_tokenizer).trace(IDS):
        pass
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    trace = modlab.trace(model, word_tokenizer, "the router decides which token runs")
    modlab.revert(model)
    assert trace.layers == [1, 3, 5] and not modlab.is_converted(model)
