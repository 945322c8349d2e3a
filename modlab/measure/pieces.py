"""What measures run over: texts or token rows, cut into pieces that fit the model.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modlab.errors import ModlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_PIECE = 2048  # tokens a text is cut at by default

Batch = dict[str, torch.Tensor]


def as_batches(data: Any, tokenizer: Any = None, seq_len: int | None = None) -> list[Batch]:
    """Token batches from what people have at hand.

    Args:
        data: a text or texts (need `tokenizer`); LongTensors [B, T] or [T]; dicts with `input_ids` (and
            `attention_mask`), as tensors or lists; a `datasets.Dataset` with a column `input_ids`.
        tokenizer: a transformers tokenizer; only for texts.
        seq_len: cut longer inputs into consecutive pieces of at most this many tokens. A piece of a single
            token predicts nothing and is dropped.

    Returns:
        list of dicts with `input_ids` long [B, T] and, where given, `attention_mask` long [B, T].

    Raises:
        ModlabError: an empty text, texts without a tokenizer, or nothing to measure on.
    """
    if isinstance(data, (str, torch.Tensor, dict)):
        data = [data]
    batches: list[Batch] = []
    for number, item in enumerate(data):
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
        if not isinstance(item, dict):
            item = {"input_ids": item}
        batch = {
            name: torch.as_tensor(item[name], dtype=torch.long)
            for name in ("input_ids", "attention_mask")
            if item.get(name) is not None
        }
        if "input_ids" not in batch:
            raise ModlabError(f"batch {number} has no input_ids; its keys are {sorted(item)}.")
        batch = {name: value[None] if value.ndim == 1 else value for name, value in batch.items()}
        length = batch["input_ids"].shape[1]
        for start in range(0, length, seq_len or max(length, 1)):
            piece = {name: value[:, start : start + (seq_len or length)] for name, value in batch.items()}
            if piece["input_ids"].shape[1] >= 2:
                batches.append(piece)
    if not batches:
        raise ModlabError(
            "nothing to measure on: give at least one text or token batch of two tokens or more."
        )
    return batches


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model's positions allow (`max_position_embeddings`), or 2,048 if its config does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2048


def piece_length(model: PreTrainedModel, tokenizer: Any, seq_len: int | None) -> int:
    """How long the pieces are that inputs are cut into, in tokens: as asked for, within the model's context.

    By default texts are cut at `TEXT_PIECE`, because their logits take tokens x vocabulary; token batches are
    taken as their maker cut them.
    """
    context = context_length(model)
    return min(context, seq_len or (TEXT_PIECE if tokenizer is not None else context))
