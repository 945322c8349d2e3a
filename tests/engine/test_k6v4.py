"""Keys in six bits and values in four have no kernels yet: fast generation says so and stands aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.errors import ModlabError
from tests.helpers.models import routed_llama

IDS = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))


def generated(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return found


def last(model: Any) -> Any:
    return modlab.fast_generation_report(model)["last"]


def test_generate_takes_the_ordinary_path_and_says_why() -> None:
    model = routed_llama(skip="kv")
    modlab.set_kv_cache_dtype(model, "k6v4")
    want = generated(model)
    with pytest.warns(UserWarning, match=r"without the engine: kv_cache_dtype='k6v4': it has no kernels"):
        modlab.enable_fast_generation(model, compile=False)
    assert torch.equal(generated(model), want)
    assert not last(model)["fast"] and "kv_cache_dtype='k6v4'" in last(model)["why"]


def test_a_live_switch_turns_it_off_and_on() -> None:
    model = modlab.enable_fast_generation(routed_llama(skip="kv"), compile=False)
    for dtype, fast in {"auto": True, "k6v4": False, "int8": True}.items():
        modlab.set_kv_cache_dtype(model, dtype)
        generated(model)
        assert last(model)["fast"] == fast, dtype


def test_a_bound_that_nobody_would_keep_to_is_refused() -> None:
    model = routed_llama(skip="kv", keep_recent=4)
    modlab.set_kv_cache_dtype(model, "k6v4")
    with pytest.raises(ModlabError, match=r"bound what the engine stores. kv_cache_dtype='k6v4'"):
        modlab.enable_fast_generation(model, compile=False, kv_tokens=16)
    modlab.set_kv_cache_dtype(model, "int8")
    modlab.enable_fast_generation(model, compile=False, kv_tokens=16)
    modlab.set_kv_cache_dtype(model, "k6v4")
    with pytest.raises(ModlabError, match="no kernels"):
        generated(model)
