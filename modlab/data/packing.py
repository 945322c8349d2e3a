"""Text in, packed token rows out: the training and held-out data of every other part.

`packed` turns a source into a `datasets.Dataset` whose rows are all exactly `seq_len` tokens long: documents
are split into train and held-out, shuffled, tokenised, joined with separators and cut, nothing is padded.
`datasets` is imported when a function runs, so that `import modlab` stays quick.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modlab.data.sources import HELDOUT_FRACTION, Source, documents, named, processes
from modlab.data.texts import refuse_names, text_of
from modlab.errors import ModlabError, check_count

if TYPE_CHECKING:
    from datasets import Dataset


def packed(
    source: Source,
    tokenizer: Any,
    seq_len: int = 2048,
    split: str | None = None,
    limit_tokens: int | None = None,
    heldout_fraction: float = HELDOUT_FRACTION,
    num_proc: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Rows of exactly `seq_len` tokens from a source, as a `datasets.Dataset` in torch format.

    Every document is written as bos + tokens + eos, where it does not begin or end with them already; with a
    tokenizer whose bos and eos are one token, or that has only one of them, that token stands once in front
    of each document. Documents are shuffled with `seed` before they are joined, and the remainder after the
    last full row is dropped. The result does not depend on `num_proc`.

    Args:
        source: as `documents` takes it; in a list, chats are written by the chat template.
        tokenizer: a `transformers` tokenizer with a bos or an eos token.
        seq_len: tokens a row.
        split: "train", "heldout" or None for everything. Which documents are held out depends on a hash alone
            (of the file's path below its root for Python source, of the text elsewhere), never on order or
            machine.
        limit_tokens: stop after this many tokens (rounded down to whole rows); only as many documents as
            needed are tokenised.
        heldout_fraction: share of the documents that is held out, in (0, 1).
        num_proc: processes for reading and tokenising; None stays in this process (where a fast tokenizer
            uses all cores for the tokenising itself).
        text_column: the column that holds the text (json and hub sources).
        cache_dir: where `datasets` keeps its copies of files and hub data; its default if None.

    Returns:
        Dataset with the one column `input_ids`, int64 tensors of shape (seq_len,) when indexed.

    Raises:
        ModlabError: unknown or unreachable source, no text, too little text, an unsuitable tokenizer.
    """
    from datasets import Features, List, Value, concatenate_datasets

    check_count("seed", seed, 0)
    check_count("seq_len", seq_len, 2)  # to predict one token from another
    if limit_tokens is not None and check_count("limit_tokens", limit_tokens) < seq_len:
        raise ModlabError(
            f"limit_tokens={limit_tokens} is less than one row (seq_len={seq_len}): raise it or shorten rows."
        )
    before, after = _separators(tokenizer)
    if isinstance(source, (list, tuple)):
        refuse_names(source, "the list of texts")
        source = [text_of(item, tokenizer, f"document {i}")[0] for i, item in enumerate(source)]
    docs = documents(source, split, heldout_fraction, num_proc, text_column, cache_dir)
    order = np.random.default_rng(seed).permutation(len(docs))
    chars = np.asarray(docs["chars"])[order]

    # With a limit, tokenise only a prefix of the shuffled documents and extend it until it is long enough.
    wanted = None if limit_tokens is None else limit_tokens // seq_len * seq_len
    identity, in_threads = _identity(tokenizer), (num_proc or 1) == 1
    parts: list[Dataset] = []
    done = total = 0
    budget = None if wanted is None else 6 * wanted + 1000
    while done < len(docs) and (wanted is None or total < wanted):
        stop = len(docs)
        if budget is not None:
            stop = min(len(docs), done + 1 + int(np.searchsorted(np.cumsum(chars[done:]), budget)))
        chosen = docs.select(order[done:stop])
        part = chosen.map(
            _tokenise,
            batched=True,
            batch_size=200,
            fn_kwargs={"tokenizer": tokenizer, "before": before, "after": after, "parallel": in_threads},
            remove_columns=docs.column_names,
            features=Features({"input_ids": List(Value("int32"))}),
            num_proc=processes(num_proc, stop - done),
            new_fingerprint=identity and _digest(chosen._fingerprint, identity, before, after),
            desc=f"Tokenising{_one_core()}" if in_threads else "Tokenising",
        )
        parts.append(part)
        done, total = stop, total + _token_count(part)
    if total < seq_len:
        raise ModlabError(
            f"{named(source, split)} holds {total} tokens in {len(docs)} document(s), fewer than one row of "
            f"seq_len={seq_len}. Give more text or a smaller seq_len."
        )
    tokens = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    rows = min(total, wanted or total) // seq_len
    cutter = _Cutter(seq_len, rows)
    out = tokens.with_format("arrow").map(
        cutter,
        batched=True,
        batch_size=1000,
        remove_columns=["input_ids"],
        features=Features({"input_ids": List(Value("int32"), length=seq_len)}),
        load_from_cache_file=False,  # the cutter carries tokens from one batch to the next
        new_fingerprint=_digest(tokens._fingerprint, seq_len, rows),
        desc=f"Packing into rows of {seq_len}",
    )
    return out.with_format("torch")


def _digest(*parts: Any) -> str:
    """A fingerprint as `datasets` takes them."""
    return hashlib.sha1("-".join(map(str, parts)).encode()).hexdigest()[:16]


def _identity(tokenizer: Any) -> str | None:
    """What makes two tokenizers one for `_tokenise`, so that the copy in another folder finds what was
    tokenised before. None for those that are not a file alone: `datasets` pickles them, name of their folder
    included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    try:
        told = json.loads(backend.to_str())
    except Exception:  # `tokenizers` has no other: a part of it is written in Python
        return None
    del told["truncation"], told["padding"]  # state that calls leave behind
    told["class"] = type(tokenizer).__qualname__
    told["split_special_tokens"] = getattr(tokenizer, "split_special_tokens", None)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _one_core() -> str:
    """What the progress bar says where the tokenizer may not use its threads: a quarter of the speed."""
    value = os.environ.get("TOKENIZERS_PARALLELISM")
    off = value is not None and value.lower() in ("", "off", "false", "f", "no", "n", "0")
    return f" on one core (TOKENIZERS_PARALLELISM={value})" if off else ""


def _tokenise(
    batch: dict[str, list[Any]], tokenizer: Any, before: list[int], after: list[int], parallel: bool
) -> dict[str, list[list[int]]]:
    if not parallel:  # a forked worker: the tokenizer must not start threads of its own
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoded = tokenizer(
        batch["text"],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )["input_ids"]
    return {"input_ids": [_separated(ids, before, after) for ids in encoded]}


def _separated(ids: list[int], before: list[int], after: list[int]) -> list[int]:
    """A document between its separators, which a chat template may have written already."""
    begun = bool(before) and ids[: len(before)] == before
    ended = bool(after) and ids[-len(after) :] == after
    return [*([] if begun else before), *ids, *([] if ended else after)]


class _Cutter:
    """Cuts a stream of token lists into rows of `seq_len`; what is left over waits for the next batch."""

    def __init__(self, seq_len: int, rows: int) -> None:
        self.seq_len, self.rows = seq_len, rows
        self.rest = np.empty(0, np.int32)

    def __call__(self, table: Any) -> dict[str, Sequence[Any]]:
        import pyarrow as pa

        ids = table["input_ids"].combine_chunks()
        flat = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        stream = np.concatenate([self.rest, flat])
        count = min(len(stream) // self.seq_len, self.rows)
        self.rows -= count
        self.rest = stream[count * self.seq_len :]
        rows = pa.FixedSizeListArray.from_arrays(pa.array(stream[: count * self.seq_len]), self.seq_len)
        return pa.table({"input_ids": rows})


def _separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids written before and after each document."""
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    if bos is None and eos is None:
        raise ModlabError(
            f"The tokenizer {type(tokenizer).__name__} has neither a bos nor an eos token, so packed "
            'documents could not be told apart. Set one, for example tokenizer.eos_token = "</s>".'
        )
    if bos is None or eos is None or bos == eos:
        only: int = bos if bos is not None else eos  # type: ignore[assignment]
        return [only], []
    return [bos], [eos]


def _token_count(part: Dataset) -> int:
    import pyarrow.compute as pc

    lengths = part.with_format("arrow")[:]["input_ids"]
    return int(pc.sum(pc.list_value_length(lengths)).as_py() or 0)
