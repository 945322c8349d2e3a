"""Rows that ask for the past: passages that come again, keys whose values are asked for.

One row asks many times: each passage or line stands at a random place and again `distance` tokens on, no
two of them overlap. So 200 passages at four distances cost 50 rows, not 800.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from modlab.errors import ModlabError

DISTANCES = (256, 1024, 4000, 7000)
PASSAGE = 64
EACH = 4
"""Passages or questions of one distance in a row."""

NAMES = [
    "alpha", "orange", "table", "window", "river", "doctor", "silver", "garden", "engine", "letter",
    "copper", "market", "island", "bottle", "mirror", "ladder", "candle", "pocket", "hammer", "forest",
    "bridge", "castle", "needle", "saddle", "basket", "carpet", "kettle", "marble", "pepper", "ribbon",
    "shadow", "temple", "violet", "walnut", "yellow", "anchor", "barrel", "cotton", "desert", "falcon",
    "guitar", "harbor", "jacket", "lemon", "magnet", "nickel",
]  # fmt: skip


@dataclass
class Probe:
    """Attributes:
    rows: int32 [R, T].
    spans: int32 [S, 4]: row, first and last (exclusive) token of what is asked for, distance.
    """

    rows: np.ndarray
    spans: np.ndarray


def fitting(T: int, width: int = PASSAGE) -> tuple[int, ...]:
    """The distances that rows of `T` tokens have room for."""
    return tuple(distance for distance in DISTANCES if distance + 2 * width < T)


def places(
    T: int, distances: tuple[int, ...], width: int, each: int, rng: random.Random
) -> list[tuple[int, int]]:
    """(start, distance) of spans of `width` that come again, none of them overlapping another.

    Raises:
        ModlabError: the rows are too short for so many.
    """
    for _ in range(100):
        found = _try_places(T, distances, width, each, rng)
        if len(found) == each * len(distances):
            return found
    raise ModlabError(
        f"rows of {T} tokens have no room for {each} spans of {width} at distances {distances}: "
        "take longer rows or fewer spans."
    )


def _try_places(
    T: int, distances: tuple[int, ...], width: int, each: int, rng: random.Random
) -> list[tuple[int, int]]:
    taken: list[int] = []
    found: list[tuple[int, int]] = []
    for distance in sorted(distances * each, reverse=True):  # widest first: they have the fewest places
        for _ in range(200):
            start = rng.randrange(32, T - distance - width + 1)
            if all(abs(start - at) >= width and abs(start + distance - at) >= width for at in taken):
                taken += [start, start + distance]
                found.append((start, distance))
                break
    return found


def recall(
    fill: np.ndarray,
    distances: tuple[int, ...] = DISTANCES,
    each: int = EACH,
    width: int = PASSAGE,
    seed: int = 0,
) -> Probe:
    """Passages of `fill` [R, T] copied forward; spans leave out a copy's first token, which nothing tells."""
    rng, rows = random.Random(seed), fill.copy()
    spans = []
    for r in range(len(rows)):
        for start, distance in places(rows.shape[1], distances, width, each, rng):
            again = start + distance
            rows[r, again : again + width] = rows[r, start : start + width]
            spans.append((r, again + 1, again + width, distance))
    return Probe(rows, np.array(spans, dtype=np.int32))


def retrieval(
    fill: np.ndarray,
    encode: Callable[[str], list[int]],
    distances: tuple[int, ...] = DISTANCES,
    each: int = EACH,
    seed: int = 0,
) -> Probe:
    """Lines `name_code = value`, each asked for once more; spans are the values' tokens."""
    rng, rows = random.Random(seed), fill.copy()
    spans = []
    for r in range(len(rows)):
        names = rng.sample(NAMES, each * len(distances))
        found = places(rows.shape[1], distances, 24, each, rng)
        for name, (start, distance) in zip(names, found, strict=True):
            question, value = encode(f"\n{name}_code = "), encode(str(rng.randrange(1000, 9999)))
            line = [*question, *value, *encode("\n")]
            for at in (start, start + distance):
                rows[r, at : at + len(line)] = line
            begin = start + distance + len(question)
            spans.append((r, begin, begin + len(value), distance))
    return Probe(rows, np.array(spans, dtype=np.int32))
