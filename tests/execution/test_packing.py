"""How kept tokens become groups of rows that run together: pure arithmetic on keep decisions."""

from __future__ import annotations

import torch

from modlab.execution.packed import Group, exact_groups, kept_first, padded_group


def keep(*rows: str) -> tuple[torch.Tensor, list[int]]:
    """Decisions written as "x" and ".", and how many tokens of each row they keep."""
    keep_BT = torch.tensor([[c == "x" for c in row] for row in rows])
    return keep_BT, keep_BT.sum(1).tolist()


def found(groups: list[Group]) -> dict[tuple[int, ...], list[list[int]]]:
    return {tuple(group.rows): group.index_RS.tolist() for group in groups}


def test_kept_tokens_come_first_and_both_parts_stay_in_order() -> None:
    assert kept_first(keep("x.x.", "..xx", "....")[0]).tolist() == [[0, 2, 1, 3], [2, 3, 0, 1], [0, 1, 2, 3]]


def test_rows_that_keep_as_many_run_together() -> None:
    groups = exact_groups(*keep("x.x.", ".xx.", "...x"))
    assert found(groups) == {(0, 1): [[0, 2], [1, 2]], (2,): [[3]]}
    assert not any(group.padded for group in groups)


def test_rows_that_keep_nothing_are_in_no_group() -> None:
    assert found(exact_groups(*keep("....", ".x..", "...."))) == {(1,): [[1]]}
    assert exact_groups(*keep("....", "....")) == []


def test_a_single_row_needs_no_sorting() -> None:
    assert found(exact_groups(*keep(".xx.x"))) == {(0,): [[1, 2, 4]]}
    assert exact_groups(*keep(".....")) == []


def test_one_row_each_where_rows_may_not_share_an_argument() -> None:
    assert found(exact_groups(*keep("x.x.", ".xx."), one_row_each=True)) == {(0,): [[0, 2]], (1,): [[1, 2]]}


def test_groups_cover_every_kept_token_once() -> None:
    keep_BT = torch.rand(7, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    covered = torch.zeros_like(keep_BT, dtype=torch.int)
    for group in exact_groups(keep_BT, keep_BT.sum(1).tolist()):
        for row, times in zip(group.rows, group.index_RS, strict=True):
            covered[row, times] += 1
    assert torch.equal(covered, keep_BT.int())


def test_padded_rows_are_as_long_as_the_longest() -> None:
    (group,) = padded_group(*keep("x.xx", "...x", "...."))
    assert group.rows == [0, 1, 2] and group.padded
    assert group.index_RS.tolist() == [[0, 2, 3], [3, 0, 1], [0, 1, 2]]


def test_a_padded_group_names_every_slot_another_token() -> None:
    """So that outputs can be put back without counting, whichever of them are dropped."""
    (group,) = padded_group(*keep("x.xx", ".x..", "...."))
    assert all(len(set(times)) == len(times) for times in group.index_RS.tolist())


def test_rows_of_one_length_are_not_padded() -> None:
    (group,) = padded_group(*keep("x.x.", ".xx."))
    assert not group.padded and group.index_RS.tolist() == [[0, 2], [1, 2]]


def test_nothing_kept_is_no_group() -> None:
    assert padded_group(*keep("....", "....")) == []
