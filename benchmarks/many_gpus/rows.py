"""The text that is trained on: this Python's own library, through the model's tokenizer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch

LEAST_ID, MOST_ID = 3, 250
"""Random ids where there is no tokenizer."""

OTHERS = "site-packages"
"""Folder of what is not this Python's own."""

AT_ONCE = 32
"""Files that a tokenizer is given at once: it takes as many as there are cores in parallel."""


def write_rows(model: str, count: int, length: int, file: Path) -> None:
    """Saves rows for a model, int64 [count, length]."""
    if not (Path(model) / "tokenizer.json").is_file():
        generator = torch.Generator().manual_seed(0)
        torch.save(torch.randint(LEAST_ID, MOST_ID, (count, length), generator=generator), file)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    paths = [path for path in sorted(Path(os.__file__).parent.glob("**/*.py")) if OTHERS not in path.parts]
    for first in range(0, len(paths), AT_ONCE):
        texts = [p.read_text(encoding="utf-8", errors="replace") for p in paths[first : first + AT_ONCE]]
        ids += itertools.chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"])
        if len(ids) >= count * length:
            break
    ids = (ids * (count * length // len(ids) + 1))[: count * length]
    torch.save(torch.tensor(ids).view(count, length), file)
