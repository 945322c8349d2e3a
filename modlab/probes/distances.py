"""Distances between two places of a row, as far as a model's context has room for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from modlab.errors import ModlabError, check_count
from modlab.hf.model import context_length
from modlab.warn import warn

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

DISTANCES = (256, 512, 1024, 2048, 4000)
"""In tokens; those that a model's context has no room for are left out."""


def fitting(
    model: PreTrainedModel, distances: Iterable[int], shortest: int, others: int, parts: str
) -> tuple[list[int], dict[int, str]]:
    """Which distances fit.

    Args:
        model: whose context counts.
        distances: in tokens.
        shortest: the least distance that makes sense.
        others: tokens that a row holds in addition to the distance.
        parts: what a row is made of, for messages.

    Returns:
        (distances that fit, ascending; `{distance: reason}` of the others).

    Raises:
        ModlabError: no distance fits, or one is below `shortest`.
    """
    context = context_length(model)
    if isinstance(distances, str) or not isinstance(distances, Iterable):
        raise ModlabError(f"distances={distances!r}: give several, for example (256, 1024).")
    wanted = sorted({check_count("distance", distance) for distance in distances})
    if not wanted:
        raise ModlabError("no distances given; give some in tokens, for example (256, 1024).")
    if wanted[0] < shortest:
        raise ModlabError(
            f"a distance of {wanted[0]:,} tokens is too short: at least {shortest:,} are needed ({parts})."
        )
    fits = [distance for distance in wanted if context is None or distance + others <= context]
    left_out = {
        distance: f"a row of {distance + others:,} tokens ({parts}) exceeds the context of {context:,}"
        for distance in wanted
        if distance not in fits
    }
    if not fits and context is not None:
        longest = context - others
        advice = f"distances up to {longest:,} fit" if longest >= shortest else "no distance fits it"
        raise ModlabError(f"distance {wanted[0]:,}: {left_out[wanted[0]]}; {advice}.")
    return fits, left_out


def note_left_out(probe: str, table: pd.DataFrame, left_out: dict[int, str]) -> pd.DataFrame:
    """The table with `attrs["left_out"]`, after a warning if there is something in it."""
    table.attrs["left_out"] = left_out
    if left_out:
        reasons = "; ".join(f"{distance:,} tokens: {reason}" for distance, reason in left_out.items())
        warn(f"{probe}: distances left out. {reasons}")
    return table
