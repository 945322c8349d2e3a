"""How many of the latest tokens go with a KV saving: those that every token may attend to, kept or not.

At equal bytes many of them take a model closer to its dense self on ordinary text, most of whose attention is
near; few leave room for keys from far back (docs/quality.md, "Recent tokens"). So they fall with the saving.

Light: settings are checked before torch is needed.
"""

from __future__ import annotations

import math
from typing import Any

from modlab.errors import ModlabError, check_count

RATIOS = (2.0, 4.0, 8.0, 16.0)
"""KV savings that a distillation takes its recent tokens from."""

CALIBRATED = (2.0, 3.0, 4.0, 8.0, 16.0)
"""KV savings whose thresholds a distilled model is given: those, and what `recipe("default")` asks of
routing in 16 bits (in eight a little more, which lies between them)."""

SAVING_TEXT = 8192
"""Tokens of a text in which a saving is counted, where neither rows nor the model's context say otherwise."""


def recent_at(
    recent_range: tuple[int, int], kv_saving: float, length: int = SAVING_TEXT, most: int | None = None
) -> int:
    """How many of the latest tokens go with a saving: the second of the range at the smallest of `RATIOS` and
    below, the first at the largest and beyond, even in logarithms between.

    With (128, 1024) that is a quarter of what rows of 8,192 tokens store, at every saving between.

    Args:
        length: tokens of the texts; no more than half of what these store.
        most: no more than that either (`Routing.most_recent`).
    """
    low, high = recent_range
    share = math.log(kv_saving / RATIOS[0]) / math.log(RATIOS[-1] / RATIOS[0])
    tokens = round(high * (low / high) ** min(1.0, max(0.0, share)))
    bounds = [tokens, int(length / kv_saving / 2)] + ([] if most is None else [most])
    return max(1, min(bounds))


def check_recent_range(recent_range: Any) -> None:
    """Refuses what is not two rising counts.

    Raises:
        ModlabError: says what was given.
    """
    if not isinstance(recent_range, list | tuple) or len(recent_range) != 2:
        raise ModlabError(f"recent_range={recent_range!r:.80}: give two counts of tokens, (low, high).")
    low, high = (check_count("recent_range", tokens) for tokens in recent_range)
    if low > high:
        raise ModlabError(f"recent_range={recent_range!r:.80}: the first has to be the smaller.")
