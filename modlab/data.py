"""Text in, packed token rows out: the training and held-out data of every other part.

`packed` turns a source into a `datasets.Dataset` whose rows are all exactly `seq_len` tokens long: documents
are split into train and held-out, shuffled, tokenised, joined with separators and cut, nothing is padded.

Sources:

- "python": the standard library and the installed packages of the running interpreter, a real corpus of long
  documents on any machine; "python-stdlib" is the standard library alone;
- a local .txt, .json or .jsonl file, or a folder of them (one document per text file or json row);
- a `datasets.Dataset` with a text column, such as `documents` returns;
- anything else is a data set on the hub, "name" or "name:config".

`datasets` is imported when a function runs, so that `import modlab` stays quick.
"""

from __future__ import annotations

import hashlib
import os
import site
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modlab.errors import ModlabError

if TYPE_CHECKING:
    from datasets import Dataset

MIN_PYTHON_CHARS = 400  # shorter files are mostly empty __init__.py
HELDOUT_FRACTION = 0.02
SPLITS = (None, "train", "heldout")
TEXT_SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json"}


def packed(
    source: str | os.PathLike[str] | Dataset,
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

    Every document is written as bos + tokens + eos; a tokenizer whose bos and eos are one token, or that has
    only one of them, gets that token once in front of each document. Documents are shuffled with `seed`
    before they are joined, and the remainder after the last full row is dropped. The result does not depend
    on `num_proc`.

    Args:
        source: see the module docstring.
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

    if seq_len < 2:
        raise ModlabError(f"seq_len is {seq_len}; a row needs at least 2 tokens to predict one from another.")
    if limit_tokens is not None and limit_tokens < seq_len:
        raise ModlabError(
            f"limit_tokens={limit_tokens} is less than one row (seq_len={seq_len}): raise it or shorten rows."
        )
    before, after = _separators(tokenizer)
    docs = documents(source, split, heldout_fraction, num_proc, text_column, cache_dir)
    order = np.random.default_rng(seed).permutation(len(docs))
    chars = np.asarray(docs["chars"])[order]

    # With a limit, tokenise only a prefix of the shuffled documents and extend it until it is long enough.
    wanted = None if limit_tokens is None else limit_tokens // seq_len * seq_len
    parts: list[Dataset] = []
    done = total = 0
    budget = None if wanted is None else 6 * wanted + 1000
    while done < len(docs) and (wanted is None or total < wanted):
        stop = len(docs)
        if budget is not None:
            stop = min(len(docs), done + 1 + int(np.searchsorted(np.cumsum(chars[done:]), budget)))
        part = docs.select(order[done:stop]).map(
            _tokenise,
            batched=True,
            batch_size=200,
            fn_kwargs={
                "tokenizer": tokenizer,
                "before": before,
                "after": after,
                "parallel": (num_proc or 1) == 1,
            },
            remove_columns=docs.column_names,
            features=Features({"input_ids": List(Value("int32"))}),
            num_proc=_processes(num_proc, stop - done),
            desc="Tokenising",
        )
        parts.append(part)
        done, total = stop, total + _token_count(part)
    if total < seq_len:
        raise ModlabError(
            f"{_name(source, split)} holds {total} tokens in {len(docs)} document(s), fewer than one row of "
            f"seq_len={seq_len}. Give more text or a smaller seq_len."
        )
    tokens = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    rows = min(total, wanted or total) // seq_len
    cutter = _Cutter(seq_len, rows)
    out = tokens.with_format(
        "arrow"
    ).map(
        cutter,
        batched=True,
        batch_size=1000,
        remove_columns=["input_ids"],
        features=Features({"input_ids": List(Value("int32"), length=seq_len)}),
        load_from_cache_file=False,  # the cutter carries tokens from one batch to the next
        new_fingerprint=hashlib.sha1(f"{tokens._fingerprint}-{seq_len}-{rows}".encode()).hexdigest()[:16],
        desc=f"Packing into rows of {seq_len}",
    )
    return out.with_format("torch")


def documents(
    source: str | os.PathLike[str] | Dataset,
    split: str | None = None,
    heldout_fraction: float = HELDOUT_FRACTION,
    num_proc: int | None = None,
    text_column: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """The documents of a source before tokenising: columns `text`, `chars` (its length) and `name`.

    `name` is the path below its root for Python source and the content hash elsewhere. Arguments and errors
    as in
    `packed`.
    """
    if split not in SPLITS:
        raise ModlabError(f"split={split!r} is not one of {SPLITS}.")
    if not 0.0 < heldout_fraction < 1.0:
        raise ModlabError(
            f"heldout_fraction={heldout_fraction}: it has to lie between 0 and 1, such as 0.02."
        )
    if not isinstance(source, (str, os.PathLike)):
        docs = _described(_with_text(source, text_column, "The data set"), num_proc)
    elif os.fspath(source) in ("python", "python-stdlib"):
        docs = _python_documents(os.fspath(source), num_proc)
    else:
        docs = _text_documents(os.fspath(source), num_proc, text_column, cache_dir)
    if len(docs) == 0:
        raise ModlabError(f"{_name(source, None)} holds no text.")
    if split is not None:
        held = np.fromiter((held_out(name, heldout_fraction) for name in docs["name"]), bool, len(docs))
        chosen = np.flatnonzero(held if split == "heldout" else ~held)
        if len(chosen) == 0:
            raise ModlabError(
                f"The {split} split of {_name(source, None)} is empty: {len(docs)} document(s) in all, "
                f"heldout_fraction={heldout_fraction}. Use split=None, more documents or another fraction."
            )
        docs = docs.select(chosen)
    return docs


def _python_documents(source: str, num_proc: int | None) -> Dataset:
    from datasets import Dataset, Features, Value

    names, paths = zip(*python_files(stdlib_only=source == "python-stdlib"), strict=True)
    text = Value("large_string")  # 64-bit offsets: with many packages installed the column outgrows 2 GB
    docs = Dataset.from_dict({"name": names, "path": paths}).map(
        _read_files,
        batched=True,
        batch_size=200,
        remove_columns=["path"],
        features=Features(
            {"name": Value("string"), "text": text, "chars": Value("int64"), "digest": Value("string")}
        ),
        num_proc=_processes(num_proc, len(names)),
        desc="Reading Python source",
    )
    # The same file often comes with several packages; the first name in sorted order stays.
    seen: set[str] = set()
    chosen = []
    for i, (chars, digest) in enumerate(zip(docs["chars"], docs["digest"], strict=True)):
        if chars >= MIN_PYTHON_CHARS and digest not in seen:
            seen.add(digest)
            chosen.append(i)
    return docs.select(chosen).select_columns(["name", "text", "chars"])


def python_files(stdlib_only: bool = False) -> list[tuple[str, str]]:
    """(path below its root with "/", absolute path) of every .py file, sorted, each name once."""
    stdlib = sysconfig.get_paths()["stdlib"]
    roots = [stdlib]
    if not stdlib_only:
        roots += [*site.getsitepackages(), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    found: dict[str, str] = {}
    for root in dict.fromkeys(os.path.realpath(r) for r in roots):
        for folder, subfolders, files in os.walk(root):
            # site-packages lies inside the standard library's folder, but is a root of its own
            subfolders[:] = [
                d for d in subfolders if d not in ("__pycache__", "site-packages", "dist-packages")
            ]
            for file in files:
                if file.endswith(".py"):
                    path = os.path.join(folder, file)
                    found.setdefault(os.path.relpath(path, root).replace(os.sep, "/"), path)
    if not found:
        raise ModlabError(f"No .py file below {roots}: this Python was installed without its source.")
    return sorted(found.items())


def _read_files(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    texts = []
    for path in batch["path"]:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):  # gone meanwhile or not UTF-8: dropped as too short
            texts.append("")
    return {
        "name": batch["name"],
        "text": texts,
        "chars": [len(t) for t in texts],
        "digest": [digest(t) for t in texts],
    }


def _text_documents(
    source: str, num_proc: int | None, text_column: str, cache_dir: str | os.PathLike[str] | None
) -> Dataset:
    from datasets import concatenate_datasets

    cache = None if cache_dir is None else os.fspath(cache_dir)
    parts = [
        _with_text(part, text_column if kind == "json" else "text", source)
        for kind, part in _load(source, cache, num_proc)
    ]
    return _described(concatenate_datasets(parts) if len(parts) > 1 else parts[0], num_proc)


def _described(docs: Dataset, num_proc: int | None) -> Dataset:
    """Adds the columns `name` (unless the documents have names) and `chars`, and drops empty documents."""
    from datasets import Features, Value

    docs = docs.map(
        _describe,
        batched=True,
        features=Features({"name": Value("string"), "text": Value("large_string"), "chars": Value("int64")}),
        num_proc=_processes(num_proc, len(docs)),
        desc="Reading text",
    )
    filled = np.flatnonzero(np.asarray(docs["chars"]) > 0)
    return docs.select(filled) if len(filled) < len(docs) else docs


def _load(source: str, cache: str | None, num_proc: int | None) -> list[tuple[str, Dataset]]:
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        kinds: dict[str, list[str]] = {}
        for file in files:
            kind = TEXT_SUFFIXES.get(file.suffix.lower())
            if kind is not None and file.stat().st_size > 0:
                kinds.setdefault(kind, []).append(str(file))
        if not kinds:
            raise ModlabError(
                f"{source} holds no text: no {', '.join(TEXT_SUFFIXES)} file that is not empty."
            )
        parts = []
        for kind, names in sorted(kinds.items()):
            options = {"sample_by": "document"} if kind == "text" else {}
            try:
                part = load_dataset(kind, data_files=names, split="train", cache_dir=cache, **options)
            except Exception as error:  # datasets raises many kinds; all mean that a file cannot be parsed
                raise ModlabError(f"Could not read {source} as {kind}: {_first_line(error)}") from error
            parts.append((kind, part))
        return parts
    if path.suffix.lower() in TEXT_SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModlabError(f"{source} does not exist. Check the path (now in {Path.cwd()}).")
    name, _, config = source.partition(":")
    try:
        data = load_dataset(name, config or None, split="train", cache_dir=cache, num_proc=num_proc)
    except Exception as error:
        raise ModlabError(
            f"Could not load {source!r} from the hub ({type(error).__name__}: {_first_line(error)}).\n"
            'Check the name ("name" or "name:config") and the network, or use what needs none: a local .txt, '
            '.json or .jsonl file, or "python" (installed Python source).'
        ) from error
    return [("json", data)]


def _with_text(data: Dataset, column: str, source: str) -> Dataset:
    if column not in data.column_names:
        raise ModlabError(f"{source} has no column {column!r}, only {data.column_names}: set text_column.")
    data = data.select_columns([column, *({"name"} & set(data.column_names) - {column})])
    return data if column == "text" else data.rename_column(column, "text")


def _describe(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    texts = [t if isinstance(t, str) and t.strip() else "" for t in batch["text"]]
    return {
        "name": batch.get("name") or [digest(t) for t in texts],
        "text": texts,
        "chars": [len(t) for t in texts],
    }


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
    return {"input_ids": [[*before, *ids, *after] for ids in encoded]}


class _Cutter:
    """Cuts a stream of token lists into rows of `seq_len`; holds the tokens left over from the batch
    before."""

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


def held_out(name: str, fraction: float = HELDOUT_FRACTION) -> bool:
    """Whether the document of this name belongs to the held-out split: its hash alone says so."""
    return int(digest(name)[:8], 16) < fraction * 2**32


def digest(text: str) -> str:
    """Hash of a text, hexadecimal."""
    return hashlib.sha1(text.encode("utf-8", "surrogatepass")).hexdigest()


def _processes(num_proc: int | None, rows: int) -> int | None:
    """More processes than rows is an error in `datasets`; a single one is cheaper without a pool."""
    wanted = min(num_proc or 1, max(rows, 1))
    return wanted if wanted > 1 else None


def _name(source: str | os.PathLike[str] | Dataset, split: str | None) -> str:
    named = repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "The data set"
    return named + (f" (split {split!r})" if split else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
