"""Texts to token arrays, on a machine that has them: what training draws from, what evaluation reads.

Training: novels, Python source of the running interpreter's packages, their Markdown and text files, lines
of made-up keys and values. Evaluation: other novels and other Python files (like the training), Wikipedia
articles and C++ headers (unlike it). Nothing that this writes belongs into the repository.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.real_models.probes import Probe, fitting, recall, retrieval

TEXTS = ("novels", "python", "wikitext", "headers")
COUNTED = ("novels", "wikitext", "headers")
"""The three texts of the results: one like the training, two not."""

EVAL_ROWS = 12  # 8 that are measured, 4 that thresholds are set on
REPEAT = "\n\nRepeat the previous context exactly.\n\n"


@dataclass
class Data:
    """Attributes:
    stream: int32, training tokens.
    lines: int32 [count, width], key-value lines padded with -1.
    texts: int32 [EVAL_ROWS, T] by name.
    recall, retrieval: the probes.
    prompt: int32, what asks for a repetition.
    """

    stream: np.ndarray
    lines: np.ndarray
    texts: dict[str, np.ndarray]
    recall: Probe
    retrieval: Probe
    prompt: np.ndarray

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "stream.npy", self.stream)
        arrays = {f"text_{name}": rows for name, rows in self.texts.items()}
        for name, probe in (("recall", self.recall), ("retrieval", self.retrieval)):
            arrays |= {f"{name}_rows": probe.rows, f"{name}_spans": probe.spans}
        arrays |= {"lines": self.lines, "prompt": self.prompt}
        np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(folder: Path) -> Data:
        arrays = np.load(folder / "data.npz")
        texts = {name[5:]: arrays[name] for name in arrays.files if name.startswith("text_")}
        recalled, retrieved = (
            Probe(arrays[f"{name}_rows"], arrays[f"{name}_spans"]) for name in ("recall", "retrieval")
        )
        stream = np.load(folder / "stream.npy", mmap_mode="r")
        return Data(stream, arrays["lines"], texts, recalled, retrieved, arrays["prompt"])


def prepare(tokenizer_file: Path, novels: Path, wikitext: Path, T: int, most: int, rows: int) -> Data:
    """Reads, tokenises and lays out.

    Args:
        novels: folder with train/ and heldout/ of .txt files.
        wikitext: one text file.
        T: length of evaluation rows.
        most: training tokens at most, of each kind a share.
        rows: of each probe.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end = tokenizer.token_to_id("<|endoftext|>") or 0

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def tokens(documents: Iterable[str], limit: int) -> np.ndarray:
        return _tokens(tokenizer, documents, end, limit)

    train, held = _python(True), list(_python(False))
    need = (EVAL_ROWS + rows) * T
    stream = np.concatenate(
        [
            tokens(_read(sorted((novels / "train").glob("*.txt")), shuffled=True), int(0.55 * most)),
            tokens(train, int(0.35 * most)),
            tokens(_documents(), int(0.1 * most)),
        ]
    )
    fiction = tokens(_pieces(sorted((novels / "heldout").glob("*.txt"))), 2 * need)
    code = tokens(held, 2 * need)
    texts = {
        "novels": fiction,
        "python": code,
        "wikitext": tokens(_pieces([wikitext]), EVAL_ROWS * T),
        "headers": tokens(_read(_headers(), shuffled=True), EVAL_ROWS * T),
    }
    fill = _fill(fiction[EVAL_ROWS * T :], code[EVAL_ROWS * T :], T, 2 * rows)
    return Data(
        stream,
        _lines(encode, 4000),
        {name: text[: len(text) // T * T].reshape(-1, T)[:EVAL_ROWS] for name, text in texts.items()},
        recall(fill[:rows], fitting(T)),
        retrieval(fill[rows:], encode, fitting(T)),
        np.array(encode(REPEAT), dtype=np.int32),
    )


def _tokens(tokenizer: Tokenizer, documents: Iterable[str], end: int, limit: int) -> np.ndarray:
    """The first `limit` tokens of the documents, an end after each."""
    ids: list[np.ndarray] = []
    count = 0
    rest = iter(documents)
    while count < limit and (batch := list(itertools.islice(rest, 32))):
        for encoded in tokenizer.encode_batch(batch, add_special_tokens=False):
            ids.append(np.array([*encoded.ids, end], dtype=np.int32))
            count += len(ids[-1])
    return np.concatenate(ids)[:limit]


def _read(files: list[Path], shuffled: bool = False) -> Iterator[str]:
    if shuffled:
        random.Random(0).shuffle(files)
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= 2000:
            yield text


def _pieces(files: list[Path], size: int = 200_000) -> Iterator[str]:
    """Pieces of long files in turn, so that a few rows hold several books."""
    texts = list(_read(files))
    for a in range(0, max(map(len, texts)), size):
        yield from (text[a : a + size] for text in texts if a < len(text))


def _site() -> list[Path]:
    return [Path(path) for path in sys.path if "python3" in path and Path(path).is_dir()]


def _python(train: bool) -> Iterator[str]:
    """Python files, each once; one in forty is held out, by its hash."""
    files = sorted({file for folder in _site() for file in folder.rglob("*.py")})
    seen: set[str] = set()
    for text in _read(files, shuffled=True):
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in seen and len(text) < 400_000 and (int(digest[:6], 16) % 40 != 0) == train:
            seen.add(digest)
            yield text


def _documents() -> Iterator[str]:
    found = {file for folder in _site() for kind in ("*.md", "*.rst", "*.txt") for file in folder.rglob(kind)}
    for text in _read(sorted(found), shuffled=True):
        if len(text) < 300_000:
            yield text


def _headers() -> list[Path]:
    return sorted({file for folder in _site() for file in folder.rglob("*.h")})


def _fill(fiction: np.ndarray, code: np.ndarray, T: int, rows: int) -> np.ndarray:
    """Rows of novels and of code in turn; where one runs out the other goes on."""
    parts = [text[: len(text) // T * T].reshape(-1, T) for text in (fiction, code)]
    turns = [parts[i % 2][i // 2] for i in range(rows) if i // 2 < len(parts[i % 2])]
    return np.stack([*turns, *parts[0][rows // 2 :]][:rows])


def _lines(encode: Callable[[str], list[int]], count: int) -> np.ndarray:
    """Made-up keys and values in several forms; none is the form that `probes.retrieval` asks in."""
    rng = random.Random(1)
    letters = "bcdfghklmnprstvz"

    def word() -> str:
        return "".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))

    forms = [
        lambda: f"\n{word()}_{word()}: {rng.randrange(10**5)}\n",
        lambda: f"\nThe {word()} of {word()} is {word()}.\n",
        lambda: f'\n    "{word()}": "{rng.randrange(16**6):06x}",\n',
        lambda: f"\nset {word()}.{word()} {rng.randrange(1000)}\n",
        lambda: f"\n{word().title()} {word().title()} -> {rng.randrange(10**4)}\n",
        lambda: f"\n{word()} = {word()}({rng.randrange(100)}, {word()})\n",
    ]
    lines = np.full((count, 32), -1, dtype=np.int32)
    for line in lines:
        ids = encode(rng.choice(forms)())[:32]
        line[: len(ids)] = ids
    return lines
