"""Keys and values in fewer bits: attentions of different mechanisms, held to the oracle.

In double precision: where two ways of running differ in the last bit, no number is rounded to another whole
one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import modlab
from modlab.cache.dtypes import RANGES
from modlab.families.proof import Batch, as_the_oracle_says, some_tokens
from modlab.families.tiny_models import quiet, tiny_model
from modlab.routing.state import masked_execution
from tests.helpers.one_branch import config_of, trained

MECHANISMS = {
    "llama": {},
    "qwen2": {"gates": "kv_head"},  # biases of keys
    "phi3": {},  # one map for queries, keys and values
    "gemma3_text": {"gates": "kv_head"},  # norms of queries and keys, sliding windows
    "falcon": {},  # its layers hand the cache on under a name of their own
    "gpt_neox": {"gates": "kv_head"},  # rotary in a part of each head
    "stablelm": {"skip": "kv+prompt"},
    "bamba": {},  # attention next to recurrent layers
}


K6V4 = ("qwen2", "gemma3_text", "stablelm")

CASES = [*((name, "int8") for name in MECHANISMS), *((name, "k6v4") for name in K6V4)]


@pytest.mark.parametrize(("model_type", "dtype"), CASES)
@torch.no_grad()
def test_every_way_of_running_is_what_the_oracle_says(model_type: str, dtype: str) -> None:
    with quiet():
        dense = tiny_model(model_type).double()
    batch = Batch(dense)
    unrouted = batch.logits()
    leaks = batch.padding_leaks(unrouted)
    batch.choose_cuts(unrouted[:1] if leaks else unrouted)
    settings: dict[str, Any] = {"skip": "kv", **MECHANISMS[model_type]}
    model = trained(modlab.convert(copy.deepcopy(dense), config_of(kv_cache_dtype=dtype, **settings)))
    batch.model = model
    opened = batch.logits()
    with modlab.routing_override(model, some_tokens):
        with modlab.record_routing(model) as recording:
            packed = batch.logits()
        with masked_execution(model):
            masked = batch.logits()
        as_the_oracle_says(batch, dense, recording.steps[0], leaks, packed=packed, masked=masked)
        steps = batch.logits_in_steps(modlab.RaggedCache(model))
    batch.agree("cached steps differ from one forward", steps, masked)
    modlab.set_kv_cache_dtype(model, "auto")
    if settings["skip"] == "kv":
        batch.agree("unrounded it is the dense model", batch.logits(), unrouted)
    assert batch.difference(opened, batch.logits()) > 1e-4, "nothing was rounded: no proof"


@pytest.mark.parametrize("dtype", RANGES)
def test_latent_attention_has_keys_and_values_of_different_widths(dtype: str) -> None:
    model = tiny_model("deepseek_v3")
    ids = torch.arange(3, 23)[None]
    modlab.convert(model, config_of("kv", kv_cache_dtype=dtype))
    widths = {(found.key_shift.shape[1], found.value_step.shape[1]) for found in model.mod.ranges.values()}
    assert all(keys != values for keys, values in widths)
    with torch.no_grad():
        cached, whole = (model(ids, use_cache=use_cache).logits for use_cache in (True, False))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


def test_a_table_of_positions_whose_length_no_setting_tells() -> None:
    """Whisper's decoder: its context has a name of its own."""
    model = modlab.convert(tiny_model("whisper"), config_of("kv", kv_cache_dtype="int8"))
    assert set(model.mod.ranges) == set(model.mod.layers)
