"""What measures, probes and training run over: token batches from whatever people have at hand.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from modlab.data.texts import PYTHON, is_chat, refuse_names, token_ids, unwrapped
from modlab.errors import ModlabError, check_count

KEYS = ("input_ids", "attention_mask", "labels", "position_ids")  # of a batch
IGNORE = -100  # the label of a token that is not to be predicted

Batch = dict[str, torch.Tensor]


def as_batches(
    data: Any,
    tokenizer: Any = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    vocabulary: int | None = None,
) -> list[Batch]:
    """Token batches from what people have at hand.

    Args:
        data: one item or an iterable of items: texts and chats (need `tokenizer`, see `modlab.data.texts`),
            rows {"text": ...} or {"messages": ...} of a data set; token ids [T] or [B, T] as lists, arrays or
            tensors; dicts with `input_ids` and, if wanted, `attention_mask`, `labels` and `position_ids`.
        tokenizer: a transformers tokenizer.
        seq_len: cut longer inputs into consecutive pieces of at most this many tokens. A piece of a single
            token predicts nothing and is dropped.
        batch_size: join single rows to batches of at most so many rows, where they are alike in length and
            keys, and split larger batches; None takes each item as it is.
        vocabulary: tokens that the model knows; ids beyond are refused.

    Returns:
        list of dicts with `input_ids` long [B, T] and, where given, the other keys, long [B, T].

    Raises:
        ModlabError: an empty text, texts without a tokenizer, a key that nothing would use, ids that the
            model does not know, or nothing to measure on.
    """
    batches = list(iter_batches(data, tokenizer, seq_len, batch_size, vocabulary))
    if batches and all("attention_mask" in b and not bool(b["attention_mask"].any()) for b in batches):
        raise ModlabError("nothing to measure on: the attention_mask says that all tokens are padding.")
    if not batches:
        raise ModlabError(
            "nothing to measure on: give at least one text or token batch of two tokens or more."
        )
    return batches


def iter_batches(
    data: Any,
    tokenizer: Any = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[Batch]:
    """As `as_batches`, one batch at a time; nothing at all is no error here."""
    if batch_size is not None:
        check_count("batch_size", batch_size)

    def pieces() -> Iterator[Batch]:
        for number, item in enumerate(items_of(data)):
            batch = _tokenised(item, number, tokenizer)
            check_vocabulary(batch, vocabulary, f"batch {number}")
            yield from _cut(batch, seq_len)

    return pieces() if batch_size is None else _grouped(pieces(), batch_size)


def items_of(data: Any) -> Iterable[Any]:
    """The items of `data`; a single text, chat, row or batch is one item."""
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a pandas table iterates over its column names
        raise ModlabError(
            f"the data is a table with the columns {list(data.columns)}: give one column as a list, such as "
            'table["text"].tolist().'
        )
    if isinstance(data, (bytes, bytearray)):
        raise ModlabError("the data is bytes, not text: decode them first.")
    if isinstance(data, str) and data in PYTHON:
        raise ModlabError(
            f"the data is the text {data!r}: is installed Python source meant? Give "
            f"modlab.data.packed({data!r}, tokenizer), or [{data!r}] for the word."
        )
    refuse_names(unwrapped(data), "the data")
    if isinstance(data, (str, torch.Tensor, np.ndarray, Mapping)) or is_chat(data) or _is_ids(data):
        return [data]
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ModlabError(
            f"the data is of type {type(data).__name__}; give texts, chats, token ids or batches of them."
        )
    return data  # type: ignore[no-any-return]


def _is_ids(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and bool(data) and isinstance(data[0], (int, np.integer))


def _tokenised(item: Any, number: int, tokenizer: Any) -> Batch:
    item = unwrapped(item)
    if not isinstance(item, str) and not is_chat(item):
        return batch_of(item, f"batch {number}")
    if tokenizer is None:
        raise ModlabError("texts need a tokenizer; pass the tokenizer, or token batches instead of texts.")
    ids = token_ids(item, tokenizer, f"text {number}")
    if len(ids) < 2:
        raise ModlabError(
            f"text {number} ({str(item)[:40]!r}) has {len(ids)} token(s); at least 2 are needed."
        )
    return {"input_ids": torch.tensor([ids])}


def batch_of(item: Any, what: str = "a batch") -> Batch:
    """A dict of long [B, T] tensors from a tensor, array, list or dict of these; a single row gets B = 1.

    Raises:
        ModlabError: no input_ids, a key that nothing would use, values that are no token ids (or 0 and 1 of a
            mask), or shapes that differ.
    """
    given = item if isinstance(item, Mapping) else {"input_ids": item}
    given = {name: value for name, value in given.items() if value is not None}
    if "input_ids" not in given:
        if isinstance(item, Mapping):
            raise ModlabError(f"{what} has no input_ids; its keys are {sorted(map(str, item))}.")
        raise ModlabError(f"{what} is None; give a text, a chat, token ids or a batch of them.")
    if unused := sorted(set(given) - set(KEYS)):
        raise ModlabError(
            f"{what} has {', '.join(map(str, unused))}, which nothing here would use: leave it out (of a "
            f"data set by remove_columns). Used are {', '.join(KEYS)}."
        )
    batch = {name: _tensor(value, f"{what}: {name}", name) for name, value in given.items()}
    ids = batch["input_ids"]
    if "position_ids" in batch and batch["position_ids"].shape[0] == 1:
        batch["position_ids"] = batch["position_ids"].expand(len(ids), -1)  # the same for each row
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    if len(set(shapes.values())) != 1:
        raise ModlabError(f"{what} needs tensors of one shape [B, T]; got {shapes}.")
    mask = batch.get("attention_mask")
    if mask is not None and bool(((mask != 0) & (mask != 1)).any()):
        raise ModlabError(f"{what}: attention_mask holds other values than 0 (padding) and 1.")
    return batch


def _tensor(value: Any, what: str, name: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ModlabError(f"{what} cannot be made a tensor ({error}): are rows of equal length?") from None
    if (tensor.dtype == torch.bool and name != "attention_mask") or not (
        tensor.dtype == torch.bool or _is_integer(tensor)
    ):
        raise ModlabError(f"{what} holds {tensor.dtype} values; whole numbers are needed.")
    if tensor.dim() not in (1, 2):
        raise ModlabError(f"{what} has shape {tuple(tensor.shape)}; [T] or [B, T] is needed.")
    tensor = tensor.long()
    return tensor if tensor.dim() == 2 else tensor[None]


def _is_integer(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True  # an empty list is made a tensor of floats
    return not (tensor.is_floating_point() or tensor.is_complex())


def predicts(batch: Batch) -> bool:
    """Whether some token of the batch is to be predicted: a real one behind a real one whose label counts."""
    target = batch.get("labels", batch["input_ids"])[:, 1:] != IGNORE
    mask = batch.get("attention_mask")
    if mask is not None:
        target = target & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(target.any())


def check_vocabulary(batch: Batch, vocabulary: int | None, what: str) -> None:
    """No id or label is one that the model does not know; on a GPU such an id would end the process.

    Args:
        batch: with `input_ids`, perhaps `labels`, long [B, T].
        vocabulary: how many tokens the model knows; None where its config does not say.
        what: names the data in messages.
    """
    for name in ("input_ids", "labels"):
        ids = batch.get(name)
        if ids is None or not ids.numel():
            continue
        told = ids[ids != IGNORE] if name == "labels" else ids
        if not told.numel():
            continue
        low, high = int(told.min()), int(told.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            knows = (
                "no token has a number below 0"
                if vocabulary is None
                else f"the model has {vocabulary} tokens"
            )
            raise ModlabError(
                f"{what} holds token ids from {low} to {high}, but {knows}: was it made with another "
                "tokenizer, or were tokens added without model.resize_token_embeddings?"
            )


def _cut(batch: Batch, seq_len: int | None) -> Iterator[Batch]:
    """Consecutive pieces of at most `seq_len` tokens; one of a single token predicts nothing, nor do no
    rows."""
    if not len(batch["input_ids"]):
        return
    length = batch["input_ids"].shape[1]
    step = seq_len or max(length, 1)
    for start in range(0, length - 1, step):
        piece = {name: value[:, start : start + step] for name, value in batch.items()}
        if piece["input_ids"].shape[1] < 2:
            return
        if start and "position_ids" in piece:
            piece["position_ids"] = _from_zero(piece["position_ids"])
        yield piece


def _from_zero(positions_BT: torch.Tensor) -> torch.Tensor:
    """Positions of a piece that begins inside a document: those of its rest count from 0 again."""
    rest = (positions_BT == 0).cumsum(1) == 0
    return torch.where(rest, positions_BT - positions_BT[:, :1], positions_BT)


def _grouped(pieces: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    rows = (
        {name: value[i : i + 1] for name, value in piece.items()}
        for piece in pieces
        for i in range(len(piece["input_ids"]))
    )
    for _, alike in itertools.groupby(rows, key=lambda row: {name: v.shape for name, v in row.items()}):
        while group := list(itertools.islice(alike, batch_size)):
            yield {name: torch.cat([row[name] for row in group]) for name in group[0]}
