"""What a model returns next to its logits has the dense form, or is refused before anything runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import modlab
from modlab.errors import ModlabError
from modlab.measure import evaluate
from modlab.routing.state import masked_execution
from tests.helpers.models import scatter_gates

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def routed(dense: Any, skip: str) -> Any:
    config = modlab.MoDConfig(skip=skip, layers=[1, 2], keep_recent=3, keep_first=1)
    model = modlab.convert(copy.deepcopy(dense), config)
    scatter_gates(model)
    return model.eval()


@pytest.mark.parametrize("skip", ["kv", "layer", "attention"])
@pytest.mark.parametrize("how", ["argument", "config", "generate"])
def test_attention_weights_of_some_tokens_are_refused(make_llama: Any, skip: str, how: str) -> None:
    model = routed(make_llama(attn_implementation="eager"), skip)
    ran: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ModlabError, match="output_attentions"):
        if how == "generate":
            model.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        elif how == "config":
            model.config.output_attentions = True
            model(IDS)
        else:
            model(IDS, output_attentions=True)
    assert not ran, "before anything runs"


@pytest.mark.parametrize("skip", ["kv", "layer", "attention", "mlp"])
def test_attention_weights_of_all_tokens_have_the_dense_form(make_llama: Any, skip: str) -> None:
    """Where MLPs alone are routed, and in the masked reference."""
    dense = make_llama(attn_implementation="eager")
    model = routed(dense, skip)
    want = [tuple(a.shape) for a in dense(IDS, output_attentions=True, use_cache=False).attentions]
    if skip == "mlp":
        got = model(IDS, output_attentions=True, use_cache=False).attentions
        assert [tuple(a.shape) for a in got] == want
    states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    assert [tuple(s.shape) for s in states] == [(2, 12, 64)] * 7


@pytest.fixture
def experts() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
            output_router_logits=True,
        )
    ).eval()  # fmt: skip


LABELS = IDS.masked_fill(MASK == 0, -100)


@pytest.mark.parametrize("skip", ["layer", "mlp"])
def test_router_logits_of_some_tokens_are_refused(experts: Any, skip: str) -> None:
    model = routed(experts, skip)
    with pytest.raises(ModlabError, match="output_router_logits"):
        model(IDS, attention_mask=MASK, labels=LABELS, use_cache=False)
    with pytest.raises(ModlabError, match="output_router_logits"):
        model(IDS, attention_mask=MASK, output_router_logits=True)
    model.train()
    model.mod.what_if = False
    with pytest.raises(ModlabError, match="output_router_logits"):
        model(IDS, attention_mask=MASK, labels=LABELS, use_cache=False)


@pytest.mark.parametrize("skip", ["layer", "mlp"])
def test_a_config_that_asks_for_them_stops_no_reading(experts: Any, skip: str) -> None:
    model = routed(experts, skip)
    output = model(IDS, attention_mask=MASK)
    assert output.router_logits is None
    assert model.generate(IDS, attention_mask=MASK, max_new_tokens=3).shape == (2, 15)
    assert evaluate(model, [{"input_ids": IDS, "attention_mask": MASK}]).loss > 0


@pytest.mark.parametrize("skip", ["kv", "attention", "layer", "mlp"])
def test_where_all_tokens_pass_the_experts_their_balance_is_the_dense_model_s(
    experts: Any, skip: str
) -> None:
    """Routers that keep everything, in a what-if pass: nothing is left out, the loss is the dense one's."""
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "use_cache": False}
    want = experts(**batch)
    model = modlab.convert(copy.deepcopy(experts), modlab.MoDConfig(skip=skip, layers=[1, 2])).train()
    got = model(**batch)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    assert [tuple(x.shape) for x in got.router_logits] == [tuple(x.shape) for x in want.router_logits]
    with masked_execution(model.eval()):
        torch.testing.assert_close(model(**batch).aux_loss, want.aux_loss)
