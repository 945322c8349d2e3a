"""The keep ratio for a memory budget: the cache that it predicts is the cache that is allocated."""

from typing import Any

import pytest
import torch

import modlab
from modlab.cache.stored import MIB, keep_ratio_for, keep_ratio_for_saving, token_bytes
from modlab.errors import ModlabError
from modlab.hf.names import given_cache
from tests.helpers.models import alternate_layers

CONTEXT = 200


def test_a_cache_of_that_ratio_takes_the_budget(tiny_llama: Any) -> None:
    keep = torch.arange(CONTEXT) % 4 == 0  # a quarter
    with modlab.routing_override(tiny_llama, lambda layer, gate, position: keep[position]), torch.no_grad():
        cache = given_cache(tiny_llama(torch.ones(1, CONTEXT, dtype=torch.long), use_cache=True))
    assert keep_ratio_for(tiny_llama, kv_mib=cache.nbytes / MIB, context=CONTEXT) == pytest.approx(0.25)
    assert keep_ratio_for(
        tiny_llama, kv_mib=2 * cache.nbytes / MIB, context=CONTEXT, batch=2
    ) == pytest.approx(0.25)
    assert token_bytes(tiny_llama) == 2 * 2 * 16 * 4  # K and V, 2 heads of 16, fp32


def test_budgets_that_make_no_sense(tiny_llama: Any, make_llama: Any) -> None:
    dense = 3 * token_bytes(tiny_llama) * CONTEXT / MIB
    with pytest.raises(ModlabError, match=f"take {dense:.4g} MiB alone"):
        keep_ratio_for(tiny_llama, kv_mib=dense, context=CONTEXT)
    with pytest.raises(ModlabError, match="nothing to save"):
        keep_ratio_for(tiny_llama, kv_mib=3 * dense, context=CONTEXT)
    with pytest.raises(ModlabError, match="above 0"):
        keep_ratio_for(tiny_llama, kv_mib=0, context=CONTEXT)
    mlp = modlab.convert(make_llama(), alternate_layers(skip="mlp"))
    with pytest.raises(ModlabError, match="routes MLPs alone: all keys and values stay"):
        keep_ratio_for(mlp, kv_mib=1, context=CONTEXT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "64", None, True])
def test_what_is_no_number_is_no_budget(tiny_llama, value: Any) -> None:
    for wrong in ({"kv_mib": value}, {"context": value}, {"batch": value}):
        with pytest.raises(ModlabError, match=r"=.* give a number"):
            keep_ratio_for(tiny_llama, **{"kv_mib": 1.0, "context": CONTEXT, **wrong})
    with pytest.raises(ModlabError, match=r"kv_saving=.* give a number"):
        keep_ratio_for_saving(value, 2, 4)
