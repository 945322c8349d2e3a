"""Cache layers that store keys and values in fewer bits: what they hold, and that nothing moves it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.cache.dtypes import RANGES
from modlab.errors import ModlabError
from tests.helpers.models import alternate_layers, dense_llama, scatter_gates

IDS = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :9] = MASK[2, 12:17] = 0


@pytest.fixture(params=RANGES)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["layer", "kv_head"])
def model(request: pytest.FixtureRequest, dtype: Any) -> Any:
    """In double precision: no number is rounded to another whole one because of its last bit."""
    config = alternate_layers(skip="kv", keep_recent=4, gates=request.param, kv_cache_dtype=dtype)
    return scatter_gates(modlab.convert(dense_llama().double(), config), 4.0)


@torch.no_grad()
def run(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    logits: Tensor = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return logits


def filled(model: Any, columns: int = 30) -> Any:
    cache = modlab.RaggedCache(model)
    run(model, IDS[:, :columns], MASK[:, :columns], cache)
    return cache


def routed(cache: Any) -> list[Any]:
    return [cache.layers[index] for index in (1, 3, 5)]


def test_codes_and_steps_and_no_second_copy(model, dtype: str) -> None:
    codes, each = {"int8": (torch.int8, 2 * (16 + 2)), "k6v4": (torch.uint8, 12 + 2 + 8 + 2)}[dtype]
    for layer in routed(filled(model)):
        held = {name: t for name, t in vars(layer).items() if isinstance(t, Tensor)}
        kinds = {name: t.dtype for name, t in held.items()}
        assert kinds == {
            "keys": codes,
            "values": codes,
            "key_steps": torch.float16,
            "value_steps": torch.float16,
            "columns": torch.int32,
            "kept": torch.bool,
        }
        assert layer.dtype == torch.float64, "what attention is given"
        assert held["key_steps"].shape == (*held["keys"].shape[:-1], 1)
        heads = held["keys"].shape[0]
        tokens = layer.capacity * heads
        assert sum(t.nbytes for t in held.values()) == tokens * each + layer.capacity * 5


def test_every_token_is_rounded_once(model, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = RANGES[dtype].encode_keys

    def counting(self: Any, keys: Tensor) -> Any:
        seen.append(keys.shape[0] * keys.shape[2])
        return encode(self, keys)

    monkeypatch.setattr(RANGES[dtype], "encode_keys", counting)
    cache = filled(model)
    for column in range(30, 40):
        run(model, IDS[:, column : column + 1], MASK[:, : column + 1], cache)
    assert sum(seen) == 3 * int(MASK.sum())


def test_rows_change_places_and_are_copied(model) -> None:
    order = torch.tensor([2, 0, 0, 1])
    moved = filled(model)
    moved.reorder_cache(order)
    got = run(model, IDS[order, 30:31], MASK[order, :31], moved)
    want = run(model, IDS[:, 30:31], MASK[:, :31], filled(model))
    torch.testing.assert_close(got, want[order])
    repeated = filled(model)
    repeated.batch_repeat_interleave(2)
    got = run(model, IDS[:, 30:31].repeat_interleave(2, 0), MASK[:, :31].repeat_interleave(2, 0), repeated)
    torch.testing.assert_close(got, want.repeat_interleave(2, 0))
    some = filled(model)
    some.batch_select_indices(torch.tensor([True, False, True]))
    torch.testing.assert_close(run(model, IDS[[0, 2], 30:31], MASK[[0, 2], :31], some), want[[0, 2]])


def test_a_prefix_is_gone_on_from_by_copies(model) -> None:
    prefix = filled(model)
    want = run(model, IDS[:, 30:], MASK, copy.deepcopy(prefix))
    again = pickle.loads(pickle.dumps(prefix))
    assert torch.equal(run(model, IDS[:, 30:], MASK, again), want)
    assert torch.equal(run(model, IDS[:, 30:], MASK, prefix), want)


def test_what_was_drafted_in_vain_is_cropped_away(model) -> None:
    cache = filled(model)
    want = run(model, IDS[:, 30:32], MASK[:, :32], copy.deepcopy(cache))
    cache.activate_past_recording()
    run(model, IDS[:, :5], torch.cat([MASK[:, :30], MASK[:, :5]], 1), cache)
    cache.crop(30)
    torch.testing.assert_close(run(model, IDS[:, 30:32], MASK[:, :32], cache), want)


def test_nbytes_count_codes_and_steps(model, dtype: str) -> None:
    rounded = filled(model)
    modlab.set_kv_cache_dtype(model, "auto")
    plain = filled(model)
    assert rounded.dense_nbytes == plain.dense_nbytes
    by_layer = [
        (
            sum(t.nbytes for t in (b.keys, b.values, b.key_steps, b.value_steps)),
            b.keys.nbytes + b.values.nbytes,
        )
        for b in routed(rounded)
    ]
    numbers, stored = {"int8": (32, 36), "k6v4": (20, 24)}[dtype]
    assert all(whole * numbers == codes * stored for whole, codes in by_layer)
    assert rounded.nbytes < plain.nbytes


@torch.no_grad()
def test_beams_samples_and_drafts_with_a_cache_and_without(model) -> None:
    prompt = {"input_ids": IDS[:2, :12], "attention_mask": MASK[:2, :12]}
    for how in ({"num_beams": 3, "do_sample": False}, {"do_sample": True}, {"do_sample": False}):
        said = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            said.append(model.generate(**prompt, **how, use_cache=use_cache, max_new_tokens=10))
        assert torch.equal(*said), how
    assert torch.equal(
        model.generate(IDS[:1, :12], do_sample=False, max_new_tokens=10, assistant_model=dense_llama(1)),
        model.generate(IDS[:1, :12], do_sample=False, max_new_tokens=10),
    )


@torch.no_grad()
def test_the_cache_of_a_reverted_model_that_lacks_tokens_is_refused(model) -> None:
    cache = filled(model)
    modlab.revert(model)
    with pytest.raises(ModlabError, match="begin with a new cache"):
        run(model, IDS[:, 30:31], MASK[:, :31], cache)
