"""Recent tokens by KV saving."""

from __future__ import annotations

from typing import Any

import pytest

from modlab.errors import ModlabError
from modlab.routing.recent_tokens import RATIOS, SAVING_TEXT, check_recent_range, recent_at


def test_they_are_a_quarter_of_what_long_rows_store() -> None:
    for saving in (*RATIOS, 3.0, 11.0):
        assert recent_at((128, 1024), saving) == pytest.approx(SAVING_TEXT / saving / 4, abs=1)


def test_they_stay_in_their_range() -> None:
    assert recent_at((128, 1024), 1.2) == 1024 and recent_at((128, 1024), 40, 2**20) == 128
    assert recent_at((128, 1024), 2, most=511) == 511 and recent_at((8, 8), 4) == 8


def test_short_texts_have_fewer() -> None:
    assert [recent_at((128, 1024), saving, 512) for saving in RATIOS] == [128, 64, 32, 16]
    assert recent_at((128, 1024), 16, 8) == 1


@pytest.mark.parametrize("wrong", [8, (8,), (8, 16, 32), (16, 8), (0, 8), (8, 16.5), "ab", None])
def test_other_ranges_are_refused(wrong: Any) -> None:
    with pytest.raises(ModlabError, match="recent_range"):
        check_recent_range(wrong)
