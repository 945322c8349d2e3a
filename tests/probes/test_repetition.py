"""Repetition measures against counts made the slow way."""

import random

import numpy as np
import pytest

from modlab.probes.repetition import (
    LOOP_TOKENS,
    LOOP_TURNS,
    distinct_ngrams,
    in_loop,
    ngrams,
    repeated_ngrams,
)


def slow_loops(ids):
    """Every stretch of whole turns and a part, tried out."""
    inside, longest = [False] * len(ids), 0
    for start in range(len(ids)):
        for stop in range(start + LOOP_TOKENS, len(ids) + 1):
            piece = ids[start:stop]
            for period in range(1, len(piece) // LOOP_TURNS + 1):
                if all(piece[i] == piece[i % period] for i in range(len(piece))):
                    inside[start:stop] = [True] * len(piece)
                    longest = max(longest, len(piece))
                    break
    return inside, longest


def test_ngrams():
    assert ngrams([1, 2, 3, 4], 3) == [(1, 2, 3), (2, 3, 4)]
    assert ngrams([1, 2], 3) == []


def test_repeated_ngrams_counts_within_a_text():
    assert repeated_ngrams([[1, 2, 3, 4, 5]], 2) == 0
    assert repeated_ngrams([[7] * 6], 2) == pytest.approx(4 / 5)
    assert repeated_ngrams([[1, 2, 3, 1, 2, 3]], 2) == pytest.approx(2 / 5)
    assert repeated_ngrams([[1, 2, 3], [1, 2, 3]], 2) == 0, "two texts may say the same"
    assert repeated_ngrams([[7] * 6, [1, 2, 3]], 2) == pytest.approx(4 / 7)
    assert repeated_ngrams([[1]], 2) == 0


def test_distinct_ngrams_counts_over_all_texts():
    assert distinct_ngrams([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct_ngrams([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_ngrams([[3, 1], [2]], 2) == 1.0, "no n-gram reaches from one text into the next"
    assert distinct_ngrams([[]], 2) == 0


@pytest.mark.parametrize(
    ("ids", "where", "longest"),
    [
        ([5] * 16, range(16), 16),
        ([5] * 15, (), 0),
        ([1, 2, 3, 4, 5, 6] * 3, range(18), 18),
        ([1, 2, 3, 4, 5, 6] * 3 + [1, 2], range(20), 20),
        ([1, 2, 3, 4, 5, 6] * 2 + [1, 2, 3, 4, 5], (), 0),  # five tokens short of three turns
        ([9, 8, *[1, 2, 3, 4] * 4, 7], range(2, 18), 16),
        (list(range(40)), (), 0),
        ([5] * 20 + list(range(30, 40)) + [1, 2] * 9, [*range(20), *range(30, 48)], 20),
        ([], (), 0),
        ([1], (), 0),
    ],
)
def test_loops(ids, where, longest):
    inside, length = in_loop(ids)
    assert np.flatnonzero(inside).tolist() == list(where)
    assert length == longest


@pytest.mark.parametrize("seed", range(30))
def test_loops_as_the_slow_way_finds_them(seed):
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < 70:  # random text with short pieces said again and again
        piece = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        ids += piece * rng.choice((1, 1, 2, 4, 9))
    inside, longest = in_loop(ids)
    assert (inside.tolist(), longest) == slow_loops(ids)
