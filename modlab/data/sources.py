"""Documents from installed Python, files, lists of texts, data sets or the hub; train and held-out by a hash.

- "python": the standard library and the installed packages of the running interpreter, a real corpus of long
  documents on any machine; "python-stdlib" is the standard library alone;
- a local .txt, .json or .jsonl file, or a folder of them (one document per text file or json row);
- a list of texts;
- a `datasets.Dataset` with a text column, such as `documents` returns;
- anything else is a data set on the hub, "name" or "name:config".
"""

from __future__ import annotations

import codecs
import hashlib
import os
import site
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from modlab.data.texts import PYTHON, checked
from modlab.errors import ModlabError, check_number
from modlab.paths import exists
from modlab.warn import warn

if TYPE_CHECKING:
    from datasets import Dataset

    Source: TypeAlias = str | os.PathLike[str] | Dataset | Sequence[str]
else:
    Source = Any

MIN_PYTHON_CHARS = 400  # shorter files are mostly empty __init__.py
HELDOUT_FRACTION = 0.02
MISSING = -1  # characters of a row that has no text
SPLITS = (None, "train", "heldout")
TEXT_SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json"}


def documents(
    source: Source,
    split: str | None = None,
    heldout_fraction: float = HELDOUT_FRACTION,
    num_proc: int | None = None,
    text_column: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """The documents of a source before tokenising: columns `text`, `chars` (its length) and `name`.

    `name` is the path below its root for Python source and the content hash elsewhere.

    Args:
        source: see the module docstring.
        split, heldout_fraction, num_proc, text_column, cache_dir: as in `packed`.

    Raises:
        ModlabError: as in `packed`.
    """
    if split not in SPLITS:
        raise ModlabError(f"split={split!r} is not one of {SPLITS}.")
    if not 0.0 < check_number("heldout_fraction", heldout_fraction) < 1.0:
        raise ModlabError(
            f"heldout_fraction={heldout_fraction}: it has to lie between 0 and 1, such as 0.02."
        )
    if source == "":
        raise ModlabError('The source is empty: give a file, a folder, a data set of the hub, or "python".')
    if isinstance(source, (list, tuple)):
        docs = _described([_of_texts(source)], source, num_proc)
    elif not isinstance(source, (str, os.PathLike)) and not hasattr(source, "column_names"):
        raise ModlabError(
            f"The source is a {type(source).__name__}: give a file or folder, a list of texts, a data set, "
            'or "python".'
        )
    elif not isinstance(source, (str, os.PathLike)):
        docs = _described([_with_text(source, text_column, "The data set")], source, num_proc)
    elif os.fspath(source) in PYTHON:
        docs = _python_documents(os.fspath(source), num_proc)
    else:
        docs = _text_documents(os.fspath(source), num_proc, text_column, cache_dir)
    if len(docs) == 0:
        raise ModlabError(f"{named(source, None)} holds no text.")
    if split is not None:
        held = np.fromiter((held_out(name, heldout_fraction) for name in docs["name"]), bool, len(docs))
        chosen = np.flatnonzero(held if split == "heldout" else ~held)
        if len(chosen) == 0:
            raise ModlabError(
                f"The {split} split of {named(source, None)} is empty: {len(docs)} document(s) in all, "
                f"heldout_fraction={heldout_fraction}. Use more documents, another fraction or split=None; "
                "`modlab train --heldout-tokens 0` evaluates on none."
            )
        docs = docs.select(chosen)
    return docs


def _of_texts(texts: Sequence[str]) -> Dataset:
    from datasets import Dataset, Features, Value

    if not texts:
        raise ModlabError("The list of texts is empty.")
    texts = [checked(text, f"document {i}") for i, text in enumerate(texts)]
    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("large_string")}))


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
        num_proc=processes(num_proc, len(names)),
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
        except (OSError, UnicodeDecodeError):  # gone by now or not UTF-8: dropped as too short
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
    cache = None if cache_dir is None else os.fspath(cache_dir)
    parts = [
        _with_text(part, text_column if kind == "json" else "text", where)
        for kind, where, part in _load(source, cache, num_proc)
    ]
    return _described(parts, source, num_proc)


def _described(parts: list[Dataset], source: Source, num_proc: int | None) -> Dataset:
    """The parts of a source as one, with the columns `name` (their own where they have names), `text` and
    `chars`, without empty documents. Rows that have no text at all are worth a word; blank ones are nothing
    unusual."""
    from datasets import concatenate_datasets

    parts = [part for part in parts if len(part)]  # `map` leaves the columns of an empty one as they are
    if not parts:
        raise ModlabError(f"{named(source, None)} holds no text.")
    docs = concatenate_datasets([_of_one_type(part, num_proc) for part in parts])
    chars = np.asarray(docs["chars"])
    if missing := int((chars == MISSING).sum()):
        warn(
            f"{missing:,} of {len(docs):,} rows have no text and are left out: their text column is missing, "
            "null or no string."
        )
    filled = np.flatnonzero(chars > 0)
    return docs.select(filled) if len(filled) < len(docs) else docs


def _of_one_type(docs: Dataset, num_proc: int | None) -> Dataset:
    """Columns of the same types whatever a file holds: what is no text in one may be one in the next."""
    from datasets import Features, Value

    return docs.map(
        _describe,
        batched=True,
        features=Features({"name": Value("string"), "text": Value("large_string"), "chars": Value("int64")}),
        num_proc=processes(num_proc, len(docs)),
        desc="Reading text",
    )


def _load(source: str, cache: str | None, num_proc: int | None) -> list[tuple[str, str, Dataset]]:
    """The parts of a source: what kind of file each is of, what messages call it, and its rows."""
    from datasets import load_dataset

    path = Path(source).expanduser()
    if exists(path, _NO_NAME):
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
        return [part for kind, names in sorted(kinds.items()) for part in _read(kind, names, source, cache)]
    if path.suffix.lower() in TEXT_SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModlabError(f"{source} does not exist. Check the path (now in {Path.cwd()}).")
    name, _, config = source.partition(":")
    if not name.isprintable() or " " in name:
        raise ModlabError(_NO_NAME.format(source[:60], "neither has blanks or line breaks"))
    try:
        data = load_dataset(name, config or None, split="train", cache_dir=cache, num_proc=num_proc)
    except Exception as error:
        raise ModlabError(
            f"Could not load {source!r} from the hub ({type(error).__name__}: {_first_line(error)}).\n"
            'Check the name ("name" or "name:config") and the network, or use what needs none: a local .txt, '
            '.json or .jsonl file, or "python" (installed Python source).'
        ) from error
    return [("json", source, data)]


def _read(kind: str, names: list[str], source: str, cache: str | None) -> list[tuple[str, str, Dataset]]:
    """The files of one kind: together, or by halves where their columns differ or one cannot be read, so that
    one such file among thousands costs a few calls more."""
    from datasets import load_dataset

    # utf-8-sig: the byte order mark that some editors write is no text
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if kind == "text" else {}
    try:
        part = load_dataset(kind, data_files=names, split="train", cache_dir=cache, **options)
    except Exception as error:  # datasets raises many kinds; all mean that a file cannot be parsed
        if len(names) > 1:
            middle = len(names) // 2
            halves = names[:middle], names[middle:]
            return [part for half in halves for part in _read(kind, half, _called(half), cache)]
        if _holds_no_row(Path(names[0])):
            return []
        raise ModlabError(f"Could not read {names[0]} as {kind}: {_cause(error)}.") from error
    return [(kind, source, part)]


def _called(names: list[str]) -> str:
    """What messages call some files of a folder."""
    return names[0] if len(names) == 1 else f"{names[0]} (with {len(names) - 1} of its neighbours)"


def _holds_no_row(file: Path) -> bool:
    """Whether a file is blank or an empty list, of which `datasets` makes an error."""
    if file.stat().st_size > 2**16:
        return False
    return b"".join(file.read_bytes().removeprefix(codecs.BOM_UTF8).split()) in (b"", b"[]")


_NO_NAME = (
    "The source {!r}... names no file and no data set ({}): is it the text itself? Give a list of texts "
    "then: [text]."
)


def _with_text(data: Dataset, column: str, source: str) -> Dataset:
    if column not in data.column_names:
        raise ModlabError(
            f"{source} has no column {column!r}, only {data.column_names}: set text_column "
            "(modlab.data.packed), or call the column of the texts 'text', which is what commands read."
        )
    data = data.select_columns([column, *({"name"} & set(data.column_names) - {column})])
    return data if column == "text" else data.rename_column(column, "text")


def _describe(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    texts = [t if isinstance(t, str) and t.strip() else "" for t in batch["text"]]
    names = batch.get("name") or [None] * len(texts)
    return {
        "name": [
            digest(text) if name is None else str(name) for name, text in zip(names, texts, strict=True)
        ],
        "text": texts,
        "chars": [
            len(text) if isinstance(given, str) else MISSING
            for text, given in zip(texts, batch["text"], strict=True)
        ],
    }


def held_out(name: str, fraction: float = HELDOUT_FRACTION) -> bool:
    """Whether the document of this name belongs to the held-out split: its hash alone says so."""
    return int(digest(name)[:8], 16) < fraction * 2**32


def digest(text: str) -> str:
    """Hash of a text, hexadecimal."""
    return hashlib.sha1(text.encode("utf-8", "surrogatepass")).hexdigest()


def processes(num_proc: int | None, rows: int) -> int | None:
    """More processes than rows is an error in `datasets`; a single one is cheaper without a pool."""
    wanted = min(num_proc or 1, max(rows, 1))
    return wanted if wanted > 1 else None


def named(source: Source, split: str | None) -> str:
    """What messages call a source."""
    if isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))
    else:
        name = "The list of texts" if isinstance(source, (list, tuple)) else "The data set"
    return name + (f" (split {split!r})" if split else "")


def _cause(error: BaseException) -> str:
    """What went wrong at the bottom of an error; of bytes that are no UTF-8, what to do."""
    while error.__cause__ is not None:
        error = error.__cause__
    cure = " (save the file as UTF-8)" if isinstance(error, UnicodeError) else ""
    return _first_line(error).rstrip(".") + cure


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
