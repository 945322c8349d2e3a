"""What measures run over: texts or token rows, cut into pieces that fit the model.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from modlab.errors import ModlabError
from modlab.hf.model import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_PIECE = 2048  # tokens a text is cut at by default

KEYS = ("input_ids", "attention_mask", "labels", "position_ids")  # of a batch: all that a forward is given

Batch = dict[str, torch.Tensor]


def as_batches(
    data: Any, tokenizer: Any = None, seq_len: int | None = None, batch_size: int | None = None
) -> list[Batch]:
    """Token batches from what people have at hand.

    Args:
        data: a text or texts (need `tokenizer`); LongTensors [B, T] or [T]; dicts with `input_ids` and, if
            wanted, `attention_mask`, `labels` and `position_ids`, as tensors or lists; a `datasets.Dataset`
            with these columns.
        tokenizer: a transformers tokenizer; only for texts.
        seq_len: cut longer inputs into consecutive pieces of at most this many tokens. A piece of a single
            token predicts nothing and is dropped.
        batch_size: join single rows to batches of at most so many rows, where they are alike in length and
            keys, and split larger batches; None takes each item as it is.

    Returns:
        list of dicts with `input_ids` long [B, T] and, where given, the other keys, long [B, T].

    Raises:
        ModlabError: an empty text, texts without a tokenizer, a key that nothing would use, or nothing to
            measure on.
    """
    batches = list(iter_batches(data, tokenizer, seq_len, batch_size))
    if not batches:
        raise ModlabError(
            "nothing to measure on: give at least one text or token batch of two tokens or more."
        )
    return batches


def iter_batches(
    data: Any, tokenizer: Any = None, seq_len: int | None = None, batch_size: int | None = None
) -> Iterator[Batch]:
    """As `as_batches`, one batch at a time; nothing at all is no error here."""
    if isinstance(data, (str, torch.Tensor, Mapping)):
        data = [data]
    pieces = (
        piece
        for number, item in enumerate(data)
        for piece in _cut(_as_batch(item, number, tokenizer), seq_len)
    )
    return pieces if batch_size is None else _grouped(pieces, batch_size)


def _as_batch(item: Any, number: int, tokenizer: Any) -> Batch:
    if isinstance(item, str):
        if tokenizer is None:
            raise ModlabError(
                "texts need a tokenizer; pass the tokenizer, or token batches instead of texts."
            )
        # verbose=False: a text longer than the context is no mistake here, it is cut into pieces
        ids = torch.as_tensor(tokenizer(item, verbose=False)["input_ids"], dtype=torch.long)
        if ids.numel() < 2:
            raise ModlabError(
                f"text {number} ({item[:40]!r}) has {ids.numel()} token(s); at least 2 are needed."
            )
        item = ids
    if not isinstance(item, Mapping):
        item = {"input_ids": item}
    given = {name: value for name, value in item.items() if value is not None}
    if "input_ids" not in given:
        raise ModlabError(f"batch {number} has no input_ids; its keys are {sorted(item)}.")
    if unused := sorted(set(given) - set(KEYS)):
        raise ModlabError(
            f"batch {number} has {', '.join(unused)}, which nothing here would use: leave it out. "
            f"Used are {', '.join(KEYS)}."
        )
    batch = {name: torch.as_tensor(value, dtype=torch.long) for name, value in given.items()}
    return {name: value[None] if value.ndim == 1 else value for name, value in batch.items()}


def _cut(batch: Batch, seq_len: int | None) -> Iterator[Batch]:
    """Consecutive pieces of at most `seq_len` tokens; one of a single token predicts nothing."""
    length = batch["input_ids"].shape[1]
    for start in range(0, length - 1, seq_len or max(length, 1)):
        piece = {name: value[:, start : start + (seq_len or length)] for name, value in batch.items()}
        if piece["input_ids"].shape[1] >= 2:
            yield piece


def _grouped(pieces: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    rows = ({name: value[i : i + 1] for name, value in p.items()} for p in pieces for i in range(_rows(p)))
    for _, alike in itertools.groupby(rows, key=lambda row: {name: v.shape for name, v in row.items()}):
        while group := list(itertools.islice(alike, batch_size)):
            yield {name: torch.cat([row[name] for row in group]) for name in group[0]}


def _rows(batch: Batch) -> int:
    return len(batch["input_ids"])


def piece_length(model: PreTrainedModel, tokenizer: Any, seq_len: int | None) -> int | None:
    """How long the pieces are that inputs are cut into, in tokens: as asked for, within the model's context;
    None for no limit.

    By default texts are cut at `TEXT_PIECE`, because their logits take tokens x vocabulary; token batches are
    taken as their maker cut them.
    """
    if seq_len is not None and seq_len < 2:
        raise ModlabError(f"seq_len={seq_len}: a piece needs at least 2 tokens, one to predict the other.")
    wanted = TEXT_PIECE if seq_len is None and tokenizer is not None else seq_len
    return min((n for n in (wanted, context_length(model)) if n is not None), default=None)
