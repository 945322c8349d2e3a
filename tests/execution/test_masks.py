"""Who may see whom, on masks small enough to be written down.

Shape letters: R rows of a group, S queries, K keys, N heads, T tokens, C columns.
"""

from __future__ import annotations

import pytest
import torch

from modlab.cache.layer import NO_KEY
from modlab.execution.masks import (
    MaskValues,
    as_attention_mask,
    masked_reference_mask,
    packed_mask,
    recent_mask,
)


def columns(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def picture(mask_ST: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask_ST.tolist()]


def test_a_packed_query_sees_keys_that_stood_before_it() -> None:
    mask = packed_mask(columns([1, 4, 6]), columns([1, 4, 6]))
    assert mask.shape == (1, 1, 3, 3)
    assert picture(mask[0, 0]) == ["x..", "xx.", "xxx"]


def test_distances_in_a_window_are_those_of_the_text_not_of_the_pack() -> None:
    """Tokens 1 and 4 are neighbours in the pack and three apart in the text."""
    assert picture(packed_mask(columns([1, 4, 6]), columns([1, 4, 6]), window=3)[0, 0]) == [
        "x..",
        ".x.",
        ".xx",
    ]


def test_cached_keys_and_slots_without_a_token() -> None:
    mask = packed_mask(columns([7], [7]), columns([0, 2, 7], [7, NO_KEY, NO_KEY]))
    assert picture(mask[:, 0, 0]) == ["xxx", "x.."]


def test_recent_counts_the_query_itself() -> None:
    assert picture(recent_mask(columns([5]), columns([2, 3, 4, 5]), 1)[0, 0]) == ["...x"]
    assert picture(recent_mask(columns([5]), columns([2, 3, 4, 5]), 3)[0, 0]) == [".xxx"]


def test_the_reference_hides_skipped_tokens_from_all_but_themselves() -> None:
    keep = torch.tensor([[True, False, True, False]])
    assert picture(masked_reference_mask(keep, torch.ones_like(keep))[0, 0]) == [
        "x...",
        "xx..",
        "x.x.",
        "x.xx",
    ]


def test_the_reference_with_recent_tokens() -> None:
    keep = torch.tensor([[True, False, False, False, False]])
    mask = masked_reference_mask(keep, torch.ones_like(keep), recent=2)
    assert picture(mask[0, 0]) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]


@pytest.mark.parametrize("real", ["0011", "1100", "1011"])
def test_padding_wherever_it_stands_is_seen_by_itself_alone(real: str) -> None:
    real_BT = torch.tensor([[c == "1" for c in real]])
    mask = masked_reference_mask(real_BT, real_BT)[0, 0]
    for key in range(4):
        if not real_BT[0, key]:
            assert mask[:, key].nonzero().tolist() == [[key]]
    assert mask.any(1).all(), "no softmax over nothing"


def test_the_reference_with_a_window() -> None:
    keep = torch.ones(1, 4, dtype=torch.bool)
    assert picture(masked_reference_mask(keep, keep, window=2)[0, 0]) == ["x...", "xx..", ".xx.", "..xx"]


ALLOWED = torch.tensor([[[[True, False], [True, True]]]])


def test_sdpa_takes_truth_and_eager_takes_numbers() -> None:
    assert as_attention_mask(ALLOWED, "sdpa", torch.float16) is ALLOWED
    added = as_attention_mask(ALLOWED, "eager", torch.float16)
    assert added.dtype == torch.float16
    assert added[0, 0].tolist() == [[0.0, torch.finfo(torch.float16).min], [0.0, 0.0]]


def given(mask: torch.Tensor, rows: int = 1) -> MaskValues:
    T = mask.shape[2]
    times = torch.arange(T).expand(rows, T)
    return MaskValues(mask, torch.arange(rows)[:, None], times, times, mask.shape[3])


def test_a_bias_of_the_models_own_stays_where_a_key_is_seen() -> None:
    bias = torch.tensor([[[[0.0, -9.0], [-1.0, 0.0]]]])
    mask = as_attention_mask(ALLOWED, "sdpa", torch.float32, given(bias))
    assert mask[0, 0].tolist() == [[0.0, torch.finfo(torch.float32).min], [-1.0, 0.0]]


@pytest.mark.parametrize("true_means_seen", [True, False])
def test_a_boolean_mask_keeps_the_models_own_meaning_of_true(true_means_seen: bool) -> None:
    """XGLM and others pass True for what is hidden to an eager attention."""
    own = ALLOWED if true_means_seen else ~ALLOWED
    mask = as_attention_mask(ALLOWED, "eager", torch.float32, given(own))
    assert torch.equal(mask, own)


def test_values_of_a_mask_are_found_by_row_time_and_column() -> None:
    mask_BNTC = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4).float()  # two new tokens, two cached columns
    rows, times, keys = torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([[0, 3, NO_KEY]])
    values = MaskValues(mask_BNTC, rows, times, keys, columns=4).values()
    assert values.shape == (1, 3, 1, 3)
    assert torch.equal(values[0, :, 0, :2], mask_BNTC[1, :, 1, [0, 3]])


def test_a_mask_shorter_than_what_was_seen_ends_at_the_newest_column() -> None:
    """A sliding layer's mask holds its window alone."""
    mask_BNTC = torch.arange(3.0).view(1, 1, 1, 3)
    values = MaskValues(
        mask_BNTC, torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([[8, 9]]), columns=10
    )
    assert values.values()[0, 0, 0].tolist() == [1.0, 2.0]
