"""Repetition in token sequences: n-grams that came before, and loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LOOP_TURNS = 3  # so many times in a row make a loop
LOOP_TOKENS = 16  # and so many tokens: rulers, indentation and rows of zeros are shorter in real text


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def repeated_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share in [0, 1] of n-grams that stand earlier in the same text, too (1 - distinct / all, seq-rep-n of
    arXiv 1908.04319), over the n-grams of all texts; 0 if no text has one.
    """
    found = [ngrams(ids, n) for ids in texts]
    total = sum(map(len, found))
    return 1 - sum(len(set(grams)) for grams in found) / total if total else 0.0


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts together over n-grams in all (distinct-n of arXiv 1510.03055), in
    [0, 1]; 0 if no text has one. It falls with the amount of text: compare equal amounts.
    """
    found = [gram for ids in texts for gram in ngrams(ids, n)]
    return len(set(found)) / len(found) if found else 0.0


def in_loop(ids: Sequence[int]) -> tuple[NDArray[np.bool_], int]:
    """Which tokens lie in a loop: a stretch of `LOOP_TOKENS` or more that is the same tokens, of whatever
    number, `LOOP_TURNS` times in a row or oftener (the last turn may be cut off after that).

    Returns:
        (bool of the text's length; tokens of the longest loop).
    """
    text = np.asarray(ids)
    inside, longest = np.zeros(len(text), bool), 0
    for period in range(1, len(text) // LOOP_TURNS + 1):
        same = np.concatenate([[False], text[period:] == text[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        for start, stop in zip(edges[::2], edges[1::2], strict=True):  # text[start:stop] repeats after period
            length = int(stop - start) + period
            if length >= max(LOOP_TURNS * period, LOOP_TOKENS):
                inside[start : start + length] = True
                longest = max(longest, length)
    return inside, longest
