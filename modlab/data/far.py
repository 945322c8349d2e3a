"""Rows with far dependencies: passages and lines of keys and values that come again, at all distances.

Text alone seldom asks for what stands a thousand tokens back. Routers that are trained on it learn to drop
just what a question about the context needs; a quarter of the rows with repetitions cures that (docs/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modlab.data.texts import is_text
from modlab.errors import ModlabError, check_count, check_number

if TYPE_CHECKING:
    from torch import Tensor

PASSAGES_SHARE, LINES_SHARE = 0.25, 0.2
"""Of the rows, unless asked otherwise."""

PASSAGES = (16, 32, 64, 128, 256)
"""Lengths of repeated passages, in tokens."""

NEAR = 4
"""Near pairs are at most a quarter of a row apart."""

EACH_PASSAGE = 340  # tokens of a row for one repeated passage
EACH_LINE = 100  # the same for one line of a pair
LINES, LINE = 4000, 32  # made-up lines, and the most tokens of one


def with_repeats(
    rows: Any,
    tokenizer: Any = None,
    *,
    passages: float = PASSAGES_SHARE,
    lines: float = LINES_SHARE,
    near: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Rows, in some of which passages come again, in others lines of made-up keys and values.

    Each row is changed by itself and keeps its length: a copy takes the place of what stood there. All
    distances that fit come equally often, but for the share `near`.

    Args:
        rows: token rows of one length: `data.packed(...)`, a tensor [rows, T], or any data set of rows.
        tokenizer: writes the lines; may be left out with lines=0.
        passages: share of the rows with repeated passages, of 16 to 256 tokens.
        lines: share of the rows with repeated lines.
        near: share of the repetitions at most a quarter of a row on, where all distances come equally often,
            too.
        seed: of all that is drawn.

    Returns:
        int32 [rows, T].

    Raises:
        ModlabError: shares that are none, rows of several lengths, no tokenizer for the lines.
    """
    import torch

    check_shares(passages, lines, near)
    check_count("seed", seed, 0)
    table = _as_table(rows).copy()
    drawn = np.random.default_rng(seed)
    known = _lines(tokenizer, seed) if lines else np.empty((0, LINE), np.int32)
    for row in table:
        kind = drawn.random()
        if kind < passages:
            _repeat_passages(row, drawn, near)
        elif kind < passages + lines:
            _repeat_lines(row, known, drawn, near)
    return torch.from_numpy(table)


def check_shares(passages: float, lines: float, near: float = 0.0) -> None:
    """The first two are shares of the same rows, the third one is of the repetitions.

    Raises:
        ModlabError: one outside [0, 1], the first two together more than all rows, or a third
            one of none.
    """
    for name, share, of in (
        ("passages", passages, "rows"), ("lines", lines, "rows"), ("near", near, "repetitions"),
    ):  # fmt: skip
        if not 0 <= check_number(name, share) <= 1:
            raise ModlabError(f"{name}={share}: a share of the {of}, in [0, 1].")
    if passages + lines > 1:
        raise ModlabError(f"passages={passages} and lines={lines} together are more than all rows.")
    if near and not passages + lines:
        raise ModlabError(
            f"near={near}: passages=0 and lines=0 leave no repetitions; give one of them, or no near."
        )


def mixed_lengths(
    rows: Any,
    tokenizer: Any = None,
    *,
    lengths: Sequence[int],
    tokens: int,
    passages: float = PASSAGES_SHARE,
    lines: float = LINES_SHARE,
    near: float = 0.0,
    seed: int = 0,
) -> list[Tensor]:
    """Batches for `modlab.train`, each of rows of one length, the lengths in turn: routers that are to work
    in short and in long contexts see both.

    Args:
        rows: token rows as `with_repeats` takes them, at least as long as the longest of `lengths`.
        tokenizer, passages, lines, near, seed: as of `with_repeats`, which each batch goes through once it is
            cut.
        lengths: tokens a row; each gets an equal share of the tokens.
        tokens: of a batch, about: each has as many rows as fit, at least one.

    Returns:
        int32 tensors [B, T], in random order, all within a quarter of the same number of tokens where each
        length goes into `tokens` several times. A longer run goes through them again.

    Raises:
        ModlabError: no lengths, rows that are too short, too few rows for one batch of each length.
    """
    import torch

    lengths = [check_count("lengths", length, 2) for length in lengths]
    check_count("tokens", tokens)
    if not lengths:
        raise ModlabError("lengths=(): name at least one length of rows, such as (1024, 4096).")
    table = _as_table(rows)
    if max(lengths) > table.shape[1]:
        raise ModlabError(
            f"lengths={tuple(lengths)}: the rows have {table.shape[1]} tokens; pack longer ones "
            f"(seq_len={max(lengths)})."
        )
    share = len(table) // len(lengths)
    batches = []
    for turn, length in enumerate(lengths):
        pieces = _cut(table[turn * share : (turn + 1) * share], length)
        size = max(1, tokens // length)
        if len(pieces) < size:
            raise ModlabError(
                f"{len(table)} rows of {table.shape[1]} tokens are too few for a batch of {tokens} tokens of "
                f"each of {len(lengths)} length(s): give more text, or fewer tokens a batch."
            )
        changed = with_repeats(
            torch.from_numpy(pieces), tokenizer, passages=passages, lines=lines, near=near, seed=seed + turn
        )
        batches += list(changed[: len(pieces) // size * size].split(size))
    order = np.random.default_rng(seed).permutation(len(batches))
    return [batches[i] for i in order]


def _cut(table: np.ndarray, length: int) -> np.ndarray:
    """Consecutive pieces of `length` tokens of each row."""
    each = table.shape[1] // length
    return np.ascontiguousarray(table[:, : each * length]).reshape(-1, length)


def _as_table(rows: Any) -> np.ndarray:
    """int32 [rows, T]."""
    if hasattr(rows, "with_format"):  # of `datasets`: all at once, not row by row
        if rows.column_names != ["input_ids"]:
            raise ModlabError(
                f"the rows have the columns {rows.column_names}; only input_ids can be changed."
            )
        parts = list(rows.with_format("numpy")[:]["input_ids"])
    elif is_text(rows):
        raise ModlabError(
            "these are texts, not token rows: data.packed(texts, tokenizer, seq_len=...) makes them."
        )
    else:
        from modlab.data.batches import as_batches

        batches = as_batches(rows)
        if unused := sorted({name for batch in batches for name in batch} - {"input_ids"}):
            raise ModlabError(f"the rows have {', '.join(unused)}, which repetitions would make wrong.")
        parts = [row for batch in batches for row in batch["input_ids"].numpy()]
    if len({len(row) for row in parts}) != 1:
        lengths = sorted({len(row) for row in parts})
        raise ModlabError(f"Rows of one length are needed, these have {lengths[:5]}: use data.packed.")
    return np.stack(parts).astype(np.int32)


def _repeat_passages(row: np.ndarray, drawn: np.random.Generator, near: float) -> None:
    T = len(row)
    for _ in range(max(1, T // EACH_PASSAGE)):
        length = int(drawn.choice(PASSAGES))
        if 4 * length > T:
            continue
        source, copy = _far_pair(T - length + 1, length, drawn, near)
        row[copy : copy + length] = row[source : source + length]


def _repeat_lines(row: np.ndarray, lines: np.ndarray, drawn: np.random.Generator, near: float) -> None:
    places = max(0, len(row) // LINE - 1)
    free = np.ones(places, bool)
    for _ in range(min(max(2, len(row) // EACH_LINE), places) // 2):
        line = lines[drawn.integers(len(lines))]
        line = line[line >= 0]
        one, other = _far_pair(places, 1, drawn, near)
        if free[one] and free[other]:  # a line that would be overwritten asks for nothing
            free[[one, other]] = False
            row[one * LINE : one * LINE + len(line)] = line
            row[other * LINE : other * LINE + len(line)] = line


def _far_pair(places: int, least: int, drawn: np.random.Generator, near: float = 0.0) -> tuple[int, int]:
    """Two of `places` starts, the later at least `least` on. All distances come equally often (of two places
    drawn at random one in fifty lies as far apart as 85 % of a row), or, of a share of the pairs, those of at
    most a quarter of the places."""
    is_near = near > 0 and drawn.random() < near
    furthest = max(least, places // NEAR) if is_near else places - 1
    distance = int(drawn.integers(least, furthest + 1))
    first = int(drawn.integers(places - distance))
    return first, first + distance


def _lines(tokenizer: Any, seed: int) -> np.ndarray:
    """Made-up keys and values in several forms, int32 [LINES, LINE], padded with -1.

    None is the form that `modlab.probes.retrieval` asks in.
    """
    if tokenizer is None:
        raise ModlabError("lines of keys and values need the tokenizer: pass it, or set lines=0.")
    rng = random.Random(seed)
    texts = [rng.choice(FORMS)(rng) for _ in range(LINES)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lines = np.full((LINES, LINE), -1, dtype=np.int32)
    for line, ids in zip(lines, encoded, strict=True):
        line[: len(ids)] = ids[:LINE]
    return lines


def _word(rng: random.Random) -> str:
    letters = "bcdfghklmnprstvz"
    return "".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


FORMS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: f"\n{_word(rng)}_{_word(rng)}: {rng.randrange(10**5)}\n",
    lambda rng: f"\nThe {_word(rng)} of {_word(rng)} is {_word(rng)}.\n",
    lambda rng: f'\n    "{_word(rng)}": "{rng.randrange(16**6):06x}",\n',
    lambda rng: f"\nset {_word(rng)}.{_word(rng)} {rng.randrange(1000)}\n",
    lambda rng: f"\n{_word(rng).title()} {_word(rng).title()} -> {rng.randrange(10**4)}\n",
    lambda rng: f"\n{_word(rng)} = {_word(rng)}({rng.randrange(100)}, {_word(rng)})\n",
)
