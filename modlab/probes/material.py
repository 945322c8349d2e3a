"""Real text as one stream of tokens, and windows of it.

Shape letters: M tokens of the stream, W windows, T tokens of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modlab.data.batches import as_batches
from modlab.errors import ModlabError, check_count
from modlab.hf.model import check_model, vocabulary_size


def token_stream(data: Any, tokenizer: Any, model: Any) -> Tensor:
    """All real tokens of `data` in order, long [M]: texts follow each other, padding is left out.

    Args:
        data: texts or token batches, as `modlab.measure.as_batches` takes them.
        tokenizer: for texts.
        model: whose vocabulary the tokens have to be of.
    """
    parts = []
    check_model(model)
    known = vocabulary_size(model)
    for batch in as_batches(data, tokenizer, vocabulary=known):
        if unused := sorted(set(batch) - {"input_ids", "attention_mask"}):
            raise ModlabError(
                f"the data has {', '.join(unused)}, which a probe does not use: it makes rows of its own "
                "from the tokens. Leave it out."
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        parts.append(ids.flatten() if mask is None else ids[mask.bool()])
    return torch.cat(parts)


def windows(stream_M: Tensor, count: int, length: int, apart: int, seed: int) -> Tensor:
    """Windows of the stream, at places drawn without replacement.

    Args:
        stream_M: long [M].
        count: how many windows, W.
        length: tokens of each, T.
        apart: windows start at multiples of this many tokens; they overlap if it is less than `length`.
        seed: of the places.

    Returns:
        long [W, T].

    Raises:
        ModlabError: the stream is too short for so many.
    """
    check_count("rows", count)
    places = max(0, (len(stream_M) - length) // apart + 1)
    if places < count:
        needed = length + (count - 1) * apart
        raise ModlabError(
            f"the data hold {len(stream_M):,} tokens, which gives {places:,} rows of {length:,} tokens that "
            f"start {apart:,} apart; {count:,} are asked for.\nGive {needed:,} tokens or more, or ask for "
            "fewer or shorter rows."
        )
    generator = torch.Generator().manual_seed(seed)
    starts_W = torch.randperm(places, generator=generator)[:count] * apart
    return stream_M[starts_W[:, None] + torch.arange(length)]
