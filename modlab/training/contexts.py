"""Texts as rows for scores: [text, "repeat it", text].

Shape letters: B rows, T tokens of a row, C tokens of one copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modlab.data import packed
from modlab.data.batches import as_batches, check_vocabulary
from modlab.data.texts import is_text
from modlab.errors import ModlabError
from modlab.hf.model import vocabulary_size

REPEAT = "\n\nRepeat the previous context exactly.\n\n"

LEAST = 2
"""Rows: one to fit to, one that is held out."""


def contexts(model: Any, data: Any, tokenizer: Any, length: int, tokens: int, seed: int) -> Tensor:
    """Texts of C tokens, drawn from the data, long [rows, C].

    Args:
        data: a source of `data.packed`, texts, or token rows, which are joined in their order.
        length: C.
        tokens: as many rows as hold that many, or as there are.
        seed: of which are drawn.

    Raises:
        ModlabError: texts without a tokenizer, too little text.
    """
    wanted = max(LEAST, tokens // length)
    if is_text(data):
        if tokenizer is None:
            raise ModlabError("texts need a tokenizer: fit_routers(model, texts, tokenizer=tokenizer).")
        rows = packed(data, tokenizer, seq_len=length, limit_tokens=wanted * length, seed=seed)
        table = torch.stack([row["input_ids"] for row in rows]) if len(rows) else torch.empty(0, length)
    else:
        stream = torch.cat([_real(batch) for batch in as_batches(data, vocabulary=vocabulary_size(model))])
        table = stream[: len(stream) // length * length].view(-1, length)
    if len(table) < LEAST:
        raise ModlabError(
            f"there are {len(table)} texts of {length} tokens, {LEAST} are the least: give more text, or a "
            "smaller context (FitConfig(context=...))."
        )
    check_vocabulary({"input_ids": table}, vocabulary_size(model), "the text")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    return table[order[:wanted]].long()


def repeated(text_BC: Tensor, prompt_P: Tensor) -> Tensor:
    """Rows [text, prompt, text]."""
    return torch.cat([text_BC, prompt_P.to(text_BC.device).expand(len(text_BC), -1), text_BC], 1)


def prompt_ids(model: Any, tokenizer: Any) -> Tensor:
    """What asks for the repetition, long [P]; nothing without a tokenizer."""
    ids = [] if tokenizer is None else tokenizer(REPEAT, add_special_tokens=False)["input_ids"]
    prompt = torch.tensor(ids, dtype=torch.long)
    check_vocabulary({"input_ids": prompt}, vocabulary_size(model), "what asks for a text once more")
    return prompt


def _real(batch: dict[str, Tensor]) -> Tensor:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return ids.flatten() if mask is None else ids[mask.bool()]
