"""Text comes in here, for every other part.

    packed(source, tokenizer)        packed token rows for training, from files, data sets, installed Python
    with_repeats(rows, tokenizer)    rows in which passages and lines come again, at all distances
    mixed_lengths(rows, tokenizer)   the same as batches of rows of several lengths
    documents(source)                the documents of a source before tokenising

`texts` reads one text, chat or list of token ids, `batches` what measures and probes run over: each kind of
input has one meaning everywhere, and a key that nothing would use is refused.
"""

from modlab.data.far import mixed_lengths, with_repeats
from modlab.data.packing import packed
from modlab.data.sources import (
    HELDOUT_FRACTION,
    MIN_PYTHON_CHARS,
    SPLITS,
    TEXT_SUFFIXES,
    digest,
    documents,
    held_out,
    python_files,
)

__all__ = [
    "HELDOUT_FRACTION",
    "MIN_PYTHON_CHARS",
    "SPLITS",
    "TEXT_SUFFIXES",
    "digest",
    "documents",
    "held_out",
    "mixed_lengths",
    "packed",
    "python_files",
    "with_repeats",
]
