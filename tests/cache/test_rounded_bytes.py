"""Bytes in fewer bits: codes and steps are counted, dense ones stay in the model's own type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modlab
from modlab.cache.bytes import dense_token_nbytes, token_nbytes
from modlab.cache.stored import MIB, keep_ratio_for, token_bytes, token_sizes
from modlab.hf.names import given_cache
from modlab.measure import evaluate
from tests.helpers.models import dense_llama, leaving_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer

CONTEXT, RECENT = 200, 8
DENSE = 2 * 2 * 16 * 2  # K and V of two heads of 16, bf16
CODES, STEPS = {"int8": DENSE // 2, "k6v4": 2 * (12 + 8)}, 2 * 2 * 2
INDEX, KEPT = 4, 1


STORED = pytest.mark.parametrize("stored_as", CODES)


def routed(
    stored_as: Any, gates: Any = "layer", layers: str = "alternate", dtype: torch.dtype = torch.bfloat16
) -> Any:
    config = modlab.MoDConfig(layers=layers, gates=gates, keep_recent=RECENT, kv_cache_dtype=stored_as)
    return scatter_gates(modlab.convert(dense_llama().to(dtype), config))


def filled(model: Any, keep: torch.Tensor) -> Any:
    """The cache after a text of which `keep` says what every gate keeps."""

    def decide(layer: int, gate: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return keep[position]

    with modlab.routing_override(model, decide), torch.no_grad():
        return given_cache(model(torch.arange(CONTEXT)[None] % 500 + 2, use_cache=True))


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
@pytest.mark.parametrize("share", [1, 4])
@STORED
def test_what_is_allocated_are_codes_steps_and_an_index(stored_as: str, gates: str, share: int) -> None:
    model, codes = routed(stored_as, gates), CODES[stored_as]
    keep = torch.arange(CONTEXT) % share == 0
    cache = filled(model, keep)
    stored = int(keep.sum()) + int((~keep[-(RECENT - 1) :]).sum())
    each = codes + STEPS + (INDEX + KEPT) * (2 if gates == "kv_head" else 1)
    assert cache.nbytes == CONTEXT * 3 * DENSE + 3 * stored * each
    assert cache.dense_nbytes == CONTEXT * 6 * DENSE
    assert [token_nbytes(layer) for layer in cache.layers] == [DENSE, codes + STEPS] * 3
    assert [dense_token_nbytes(layer) for layer in cache.layers] == [DENSE] * 6
    assert token_sizes(model) == (DENSE, codes + STEPS) and token_bytes(model) == DENSE


@STORED
def test_of_single_precision_the_dense_bytes_are_four_a_number(stored_as: str) -> None:
    model = routed(stored_as, dtype=torch.float32)
    assert token_sizes(model) == (2 * DENSE, CODES[stored_as] + STEPS)
    assert filled(model, torch.ones(CONTEXT).bool()).dense_nbytes == CONTEXT * 6 * 2 * DENSE


def test_switched_off_it_stores_what_it_stored_before() -> None:
    model = routed("k6v4")
    modlab.set_kv_cache_dtype(model, "auto")
    assert token_sizes(model) == (DENSE, DENSE)
    assert filled(model, torch.ones(CONTEXT).bool()).nbytes == CONTEXT * (6 * DENSE + 3 * (INDEX + KEPT))


@pytest.mark.parametrize("gates", ["layer", "kv_head"])
@STORED
def test_a_budget_in_fewer_bits_is_kept_to(stored_as: str, gates: str) -> None:
    model = routed(stored_as, gates)
    cache = filled(model, torch.arange(CONTEXT) % 4 == 0)
    stored = keep_ratio_for(model, kv_mib=cache.nbytes / MIB, context=CONTEXT)
    # of what is recent a quarter is kept anyway, here and in the arithmetic but for the fraction of a token
    assert stored == pytest.approx(0.25, abs=0.01)
    modlab.set_kv_cache_dtype(model, "auto")
    with pytest.raises(modlab.ModlabError, match="too little"):
        keep_ratio_for(model, kv_mib=cache.nbytes / MIB / 1.4, context=CONTEXT)


@STORED
def test_a_cache_with_nothing_dropped_saves_what_fewer_bits_save(stored_as: str) -> None:
    model = routed(stored_as, layers="all")
    modlab.set_threshold(model, 0.0)
    ids = torch.arange(CONTEXT)[None] % 500 + 2
    found = evaluate(model, [{"input_ids": ids}])
    assert found.keep_ratio == 1
    assert found.kv_saving == pytest.approx(DENSE / (CODES[stored_as] + STEPS + INDEX + KEPT), rel=0.001)
    with modlab.KVTracker(model) as kv, torch.no_grad():
        model(ids, use_cache=True)
    assert kv.summary()["kv_saving"] == pytest.approx(found.kv_saving)
    assert kv.summary()["dense_kv_bytes"] == CONTEXT * 6 * DENSE


@STORED
def test_prompts_that_leave_are_counted_too(stored_as: str) -> None:
    model = leaving_llama("kv+prompt", gates="kv_head")
    modlab.set_kv_cache_dtype(model, stored_as)
    assert token_sizes(model) == (2 * DENSE, CODES[stored_as] + STEPS)  # single precision


@STORED
def test_a_trace_saves_what_its_cache_saves(stored_as: str) -> None:
    model, codes = routed(stored_as, layers="all"), CODES[stored_as]
    trace = modlab.trace(model, make_tokenizer(), list(range(2, CONTEXT)))
    assert trace.kv_cache_dtype == stored_as and trace.kv_bytes_per_token == DENSE
    assert trace.stored_bytes_per_token == codes + STEPS
    stored = trace.keep.copy()
    stored[:, -trace.keep_recent :] = True
    assert trace.kv_saving == pytest.approx(DENSE / (codes + STEPS) / stored.mean())
    assert trace.preview_saving(0.0) == pytest.approx(DENSE / (codes + STEPS))
