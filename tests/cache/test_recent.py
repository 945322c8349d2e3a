"""With `skip="kv"` the recent past is counted in a row's own tokens: each row runs as it would alone,
wherever padding stands.

Shape letters: B rows, T tokens, S tokens of one call, K keys.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import modlab
from modlab.cache.recent import RecentLayer
from modlab.execution.masked_keys import log_weights
from modlab.execution.masks import masked_reference_mask
from modlab.routing.record import ForwardCall
from modlab.routing.state import masked_execution
from tests.helpers.models import alternate_layers, dense_llama, scatter_gates
from tests.helpers.routing import random_routing

T = 64
IDS = torch.randint(3, 512, (4, T), generator=torch.Generator().manual_seed(1))


def mask_of(*holes: tuple[int, int]) -> Tensor:
    """All tokens of one row but those in the given spans."""
    row = torch.ones(T, dtype=torch.long)
    for start, end in holes:
        row[start:end] = 0
    return row


MASKS = {
    "one hole each": torch.stack([mask_of(), mask_of((12, 18)), mask_of((3, 4)), mask_of((20, 31))]),
    "holes and edges": torch.stack(
        [mask_of((0, 9), (15, 22)), mask_of((8, 11), (13, 14), (27, 30)), mask_of((0, 29)), mask_of()]
    ),
    "a hole longer than the recent past": torch.stack(
        [mask_of((4, 30)), mask_of((1, 29)), mask_of((10, 28)), mask_of((2, 12), (14, 28))]
    ),
}
CALLS = {
    "one forward": [(0, T)],
    "prompt and turn": [(0, 30), (30, T)],
    "steps": [(0, 30), *((t, t + 1) for t in range(30, T))],
    "chunks that end in padding": [(0, 5), (5, 13), (13, 28), (28, 29), (29, 50), (50, T)],
}


def make_model(keep_recent: int) -> Any:
    config = alternate_layers(skip="kv", keep_recent=keep_recent, keep_first=1)
    return modlab.convert(dense_llama(num_hidden_layers=4), config)


def alone(model: Any, mask: Tensor) -> list[Tensor]:
    """Logits of each row without its padding."""
    return [
        model(row[None, real.bool()], use_cache=False).logits[0] for row, real in zip(IDS, mask, strict=True)
    ]


def in_calls(model: Any, mask: Tensor, calls: list[tuple[int, int]]) -> list[Tensor]:
    """Logits of each row's tokens, cut into calls with one cache."""
    cache, logits = modlab.RaggedCache(model), []
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for start, end in calls:
        out = model(
            IDS[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=position[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
    return [row[real.bool()] for row, real in zip(torch.cat(logits, 1), mask, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("keep_recent", [1, 2, 5, 16])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_each_row_is_as_alone(mask: Tensor, calls: list[tuple[int, int]], keep_recent: int) -> None:
    model = make_model(keep_recent)
    with modlab.routing_override(model, random_routing(0.3)):
        for got, want in zip(in_calls(model, mask, calls), alone(model, mask), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["reference", "training"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_execution_counts_tokens_too(mask: Tensor, training: bool) -> None:
    model = make_model(5).train(training)
    model.mod.what_if = False
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with modlab.routing_override(model, random_routing(0.3)):
        want = alone(model.eval(), mask)
        with masked_execution(model):
            out = model.train(training)(IDS, attention_mask=mask, position_ids=position, use_cache=False)
    for got, real, row in zip(out.logits, mask, want, strict=True):
        torch.testing.assert_close(got[real.bool()], row, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_stored_are_kept_tokens_and_each_rows_latest() -> None:
    """After a prefill; rows that ended apart have as many recent tokens as the others."""
    model, mask = make_model(5), MASKS["holes and edges"][:, :30]
    with modlab.routing_override(model, random_routing(0.3)):
        cache = model(IDS[:, :30], attention_mask=mask, use_cache=True).past_key_values
    for index in model.mod.layers:
        layer = cache.layers[index]
        assert isinstance(layer, RecentLayer) and layer.columns is not None
        tokens = mask.cumsum(1)
        keep = random_routing(0.3)(index, None, tokens - 1) | (tokens == 0)
        stored = mask.bool() & (keep | (tokens > tokens[:, -1:] - 4))
        for row, (start, n) in enumerate(zip(layer.starts, layer.lengths, strict=True)):
            assert layer.columns[start : start + n].tolist() == stored[row].nonzero()[:, 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "crop"])
def test_row_operations_keep_each_rows_own_count(operation: str) -> None:
    model, mask, ids, seen = make_model(5), MASKS["one hole each"], IDS, 36
    with modlab.routing_override(model, random_routing(0.3)):
        cache = modlab.RaggedCache(model)
        for start, end in [(0, 33), (33, 34), (34, 35), (35, 36)]:
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            model(
                ids[:, start:end], attention_mask=mask[:, :end], position_ids=position, past_key_values=cache
            )
        if operation == "crop":
            cache.crop(-2)
            seen -= 2
            rows = [0, 1, 2, 3]
        else:
            rows = {"reorder": [2, 0, 1, 1], "repeat": [0, 0, 1, 1, 2, 2, 3, 3], "select": [3, 1]}[operation]
            if operation == "reorder":
                cache.reorder_cache(torch.tensor(rows))
            elif operation == "repeat":
                cache.batch_repeat_interleave(2)
            else:
                cache.batch_select_indices(torch.tensor(rows))
        ids, mask = ids[rows], mask[rows]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(
            ids[:, seen:], attention_mask=mask, position_ids=position[:, seen:], past_key_values=cache
        ).logits
        want = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, seen:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_after_rows_that_ended_apart() -> None:
    """A second turn of a batched chat: what each row says is what it says alone."""
    model, mask = make_model(4), MASKS["one hole each"][:, :40]
    scatter_gates(model, 2.4)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(IDS[:, :40], attention_mask=mask, **settings)[:, 40:]
    for row in range(4):
        ids = IDS[row : row + 1, :40][:, mask[row].bool()]
        assert model.generate(ids, **settings)[0, ids.shape[1] :].tolist() == together[row].tolist()


def test_the_reference_mask_counts_tokens() -> None:
    """Two tokens, three of padding, two tokens; nothing kept, two recent tokens."""
    real = torch.tensor([[True, True, False, False, False, True, True]])
    seen = masked_reference_mask(torch.zeros_like(real), real, recent=2)[0, 0]
    assert seen[5].nonzero()[:, 0].tolist() == [1, 5] and seen[6].nonzero()[:, 0].tolist() == [5, 6]
    one = masked_reference_mask(torch.zeros_like(real), real, recent=1)[0, 0]
    assert torch.equal(one[real[0]], torch.eye(7, dtype=torch.bool)[real[0]])
    window = masked_reference_mask(real, real, window=5, recent=2)[0, 0]
    assert window[5].nonzero()[:, 0].tolist() == [1, 5], "a window has padding in it, as the dense model's"


def test_what_if_weights_spare_the_recent_tokens() -> None:
    real = torch.tensor([[True, True, False, False, True], [True] * 5])
    call: Any = SimpleNamespace(real=real)
    site: Any = SimpleNamespace(call=call, recent=2, query_heads=1)
    weights = log_weights(torch.full((2, 5), -3.0), site)
    assert (weights[0, 0, 4] == 0).tolist() == [
        False,
        True,
        True,
        True,
        True,
    ]  # those of padding mean nothing
    assert (weights[1, 0, 4] == 0).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("rows", "gaps"),
    [
        (["1111", "1111"], False),
        (["0011", "1100"], False),
        (["0110", "1111"], False),
        (["1111", "1011"], True),
        (["0101", "1111"], True),
        (["0000", "0001"], False),
    ],
    ids=str,
)
def test_padding_inside_a_row_is_told_from_padding_around_it(rows: list[str], gaps: bool) -> None:
    real = torch.tensor([[letter == "1" for letter in row] for row in rows])
    call = ForwardCall(
        *(real, real.cumsum(1) - 1, torch.arange(4), 4, None, []),
        thresholds={},
        what_if=False,
        masked=False,
        override=None,
        recent=None,
        padding_mask=real,
    )
    assert call.has_gaps == gaps
    assert not replace(call, padding_mask=None).has_gaps, "without a mask nobody is asked"
