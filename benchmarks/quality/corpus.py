"""Text to token rows: Python source of the running interpreter and, where there is a folder of them, novels.

`modlab.data.packed` does this for users, through `datasets`. The machine with the GPU has no `datasets`, so
here the same files, held out by the same hash, are tokenised into plain arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.byte_level_bpe import train_byte_level_bpe
from benchmarks.quality.scale import Scale
from modlab.data import MIN_PYTHON_CHARS, digest, held_out, python_files
from modlab.saving.demos import DEMO_FOLDER, DEMOS

SAMPLE_CHARS = 40_000_000  # that the tokenizer is trained on
BATCH = 64  # documents tokenised at once


@dataclass
class Corpus:
    """Attributes:
    tokenizer: byte-level BPE, trained on the train split.
    train: int32 [rows, seq_len].
    heldout: by source, "python" and "novels": int32 [rows, seq_len].
    """

    tokenizer: Any
    train: Tensor
    heldout: dict[str, Tensor]


def prepare(scale: Scale, folder: Path, novels: Path | None, tokenizer_file: Path | None = None) -> None:
    """Writes tokenizer and tokens to `folder`, unless they are there.

    Args:
        scale: vocabulary.
        folder: gets tokenizer/, train.npy and heldout_<source>.npy.
        novels: folder with train/ and heldout/ of .txt files.
        tokenizer_file: a finished tokenizer.json to take instead of training one.
    """
    if (folder / "corpus.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_file is None and scale.shipped is not None:
        tokenizer_file = DEMO_FOLDER / DEMOS[scale.shipped] / "tokenizer.json"
    tokenizer = _load_tokenizer(tokenizer_file) if tokenizer_file else _train_tokenizer(scale, novels)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size()}
    small = scale.stdlib_only
    train = [_tokens(tokenizer, _python(False, small), limit=3 * scale.base_tokens if small else None)]
    sources = {"python": _python(True, small)}
    if novels is not None and not small:
        train.append(_tokens(tokenizer, _novels(novels / "train")))
        sources["novels"] = _novels(novels / "heldout")
    facts["train_tokens"] = dict(zip(("python", "novels"), map(len, train), strict=False))
    rows = [part[: len(part) // scale.seq_len * scale.seq_len].reshape(-1, scale.seq_len) for part in train]
    mixed = np.concatenate(rows)
    np.random.default_rng(0).shuffle(mixed)
    np.save(folder / "train.npy", mixed)
    for name, documents in sources.items():
        part = _tokens(tokenizer, documents, limit=2 * scale.heldout_tokens)
        count = min(len(part), scale.heldout_tokens) // scale.seq_len
        np.save(folder / f"heldout_{name}.npy", part[: count * scale.seq_len].reshape(count, -1))
        facts[f"heldout_{name}"] = count * scale.seq_len
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


def load(scale: Scale, folder: Path) -> Corpus:
    """What `prepare` wrote."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<s>", pad_token="<pad>",
        model_max_length=scale.seq_len, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    heldout = {
        path.stem.removeprefix("heldout_"): _rows(path) for path in sorted(folder.glob("heldout_*.npy"))
    }
    return Corpus(tokenizer, _rows(folder / "train.npy"), heldout)


def _rows(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path).astype(np.int32))


def _python(held: bool, stdlib_only: bool) -> Iterator[str]:
    """Installed Python source, each text once, in an order that does not follow the file tree."""
    seen: set[str] = set()
    files = [pair for pair in python_files(stdlib_only) if held_out(pair[0]) == held]
    for i in np.random.default_rng(0).permutation(len(files)):
        try:
            text = Path(files[i][1]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        mark = digest(text)
        if len(text) >= MIN_PYTHON_CHARS and mark not in seen:
            seen.add(mark)
            yield text


def _novels(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.txt")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _tokens(tokenizer: Any, documents: Iterator[str], limit: int | None = None) -> np.ndarray:
    """`<s>` and its tokens for each document, uint16."""
    parts: list[np.ndarray] = []
    total = 0
    batch: list[str] = []

    def flush() -> None:
        nonlocal total
        for encoding in tokenizer.encode_batch_fast(batch):  # no offsets: twice as fast
            parts.append(np.asarray(encoding.ids, dtype=np.uint16))
            total += len(encoding.ids)
        batch.clear()

    for text in documents:
        batch.append(text)
        if len(batch) == BATCH:
            flush()
            if limit is not None and total >= limit:
                break
    flush()
    return np.concatenate(parts)


def _train_tokenizer(scale: Scale, novels: Path | None) -> Any:
    def sample() -> Iterator[str]:
        limit = min(SAMPLE_CHARS, 20 * scale.base_tokens)
        sources = [_python(False, scale.stdlib_only)]
        if novels is not None and not scale.stdlib_only:
            sources.append(_novels(novels / "train"))
        for source in sources:
            taken = 0
            for text in source:
                taken += len(text)
                if taken > limit // len(sources):
                    break
                yield text

    return train_byte_level_bpe(sample(), scale.vocabulary)


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
