"""What a measure runs over: the batches of its data, cut so that they fit the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modlab.data.batches import Batch, as_batches, iter_batches
from modlab.errors import check_count
from modlab.hf.model import check_model, context_length, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_PIECE = 2048  # tokens a text is cut at by default


def batches_for(
    model: PreTrainedModel, data: Any, tokenizer: Any = None, seq_len: int | None = None
) -> list[Batch]:
    """As `as_batches`, in pieces that fit the model, of tokens that it knows."""
    return as_batches(data, tokenizer, piece_length(model, tokenizer, seq_len), None, vocabulary_size(model))


def iter_batches_for(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
) -> Iterator[Batch]:
    """As `batches_for`, one batch at a time, of `batch_size` rows; nothing at all is no error here."""
    length = piece_length(model, tokenizer, seq_len)
    return iter_batches(data, tokenizer, length, batch_size, vocabulary_size(model))


def piece_length(model: PreTrainedModel, tokenizer: Any, seq_len: int | None) -> int | None:
    """How long the pieces are that inputs are cut into, in tokens: as asked for, within the model's context;
    None for no limit.

    By default texts are cut at `TEXT_PIECE`, because their logits take tokens x vocabulary; token batches are
    taken as their maker cut them.
    """
    check_model(model)
    if seq_len is not None:
        seq_len = check_count("seq_len", seq_len, 2)  # one token to predict the other
    wanted = TEXT_PIECE if seq_len is None and tokenizer is not None else seq_len
    return min((n for n in (wanted, context_length(model)) if n is not None), default=None)
