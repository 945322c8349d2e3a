"""Packed execution equals the masked reference, over families, parts, gate forms, batches, paddings."""

import pytest
import torch

import modlab
from modlab.families.support import REQUIRED
from modlab.families.tiny_models import tiny_model
from modlab.routing.state import masked_execution
from tests.helpers.models import alternate_layers, scatter_gates
from tests.helpers.routing import (
    ODD as T,
)
from tests.helpers.routing import (
    assert_packed_is_masked,
    assert_same,
    inputs,
    positions,
    random_routing,
)

# transformers itself refuses sdpa for Gemma 2, whose attention caps its logits.
FAMILIES = [(f, a) for f in REQUIRED for a in ("eager", "sdpa") if (f, a) != ("gemma2", "sdpa")]


@torch.no_grad()
@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_families(family, attention) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    ids, mask = inputs(model, "left")
    extra = positions(mask)
    dense = model(ids, attention_mask=mask, use_cache=False, **extra).logits
    one_row = model(ids[:1], use_cache=False).logits
    modlab.convert(model, alternate_layers())
    assert torch.equal(model(ids[:1], use_cache=False).logits, one_row)
    assert_same(model(ids, attention_mask=mask, use_cache=False, **extra).logits, dense, mask)
    with modlab.routing_override(model, random_routing()):
        with masked_execution(model):
            expected = model(ids, attention_mask=mask, use_cache=False, **extra).logits
        assert not torch.allclose(expected[mask.bool()], dense[mask.bool()], atol=1e-3)
        assert_same(model(ids, attention_mask=mask, use_cache=False, **extra).logits, expected, mask)
        out = model(
            ids[:, :20],
            attention_mask=mask[:, :20],
            use_cache=True,
            position_ids=extra["position_ids"][:, :20],
        )
        logits = [out.logits]
        for t in range(20, T):
            at = extra["position_ids"][:, t : t + 1]
            out = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                past_key_values=out.past_key_values,
                position_ids=at,
            )
            logits.append(out.logits)
        assert_same(torch.cat(logits, 1), expected, mask)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("padding", ["one row", "none", "left", "right"])
@pytest.mark.parametrize("gate", ["straight-through", "fused", "paper"])
@pytest.mark.parametrize("skip", ["layer", "attention", "mlp"])
def test_forms(make_llama, skip, gate, padding, share) -> None:
    model = modlab.convert(
        make_llama(), modlab.MoDConfig(skip=skip, gate=gate, layers=[0, 2, 3], init_gate=0.8)
    )
    ids, mask = inputs(model, padding)
    with modlab.routing_override(model, random_routing(share)):
        expected = assert_packed_is_masked(model, ids, mask)
        if padding != "right":
            chunks = model(ids[:, :11], attention_mask=None if mask is None else mask[:, :11], use_cache=True)
            rest = model(ids[:, 11:], attention_mask=mask, past_key_values=chunks.past_key_values)
            both = torch.cat([chunks.logits, rest.logits], 1)
            assert_same(both, expected, mask)


def test_a_number_that_a_trainer_passes_along_reaches_the_layers(make_llama) -> None:
    """transformers' Trainer hands `num_items_in_batch`, a tensor without an axis, down to every layer."""
    model = modlab.convert(make_llama(), alternate_layers())
    scatter_gates(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        passed = model(ids, use_cache=False, num_items_in_batch=torch.tensor(36)).logits
    assert torch.equal(plain, passed)
