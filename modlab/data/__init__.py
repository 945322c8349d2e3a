"""Text comes in here, for every other part.

    packed(source, tokenizer)        packed token rows for training, from files, data sets, installed Python
    documents(source)                the documents of a source before tokenising

`texts` reads one text, chat or list of token ids, `batches` what measures and probes run over: each kind of
input has one meaning everywhere, and a key that nothing would use is refused.
"""

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
    "packed",
    "python_files",
]
