"""Stage 1: a byte-level BPE tokenizer from the train split, and both splits packed into rows on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import common
import numpy as np


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--source", default="python", help="what modlab.data.packed takes; python-stdlib is a small one"
    )
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument(
        "--sample-mb", type=float, default=40, help="characters (millions) that the BPE is trained on"
    )
    parser.add_argument("--limit-tokens", type=int, help="at most so many training tokens")
    parser.add_argument(
        "--num-proc", type=int, default=os.cpu_count(), help="processes that read and tokenise"
    )
    args = parser.parse_args()
    started = time.perf_counter()

    from modlab import data

    train_docs = data.documents(args.source, "train", num_proc=args.num_proc)
    heldout_docs = data.documents(args.source, "heldout", num_proc=args.num_proc)
    read = time.perf_counter()
    tokenizer = train_tokenizer(train_docs, args.vocab_size, args.sample_mb * 1e6)
    tokenizer.save_pretrained(args.out / "tokenizer")
    trained = time.perf_counter()
    counts = {}
    for split in ("train", "heldout"):
        limit = args.limit_tokens if split == "train" else None
        rows = data.packed(
            train_docs if split == "train" else heldout_docs,
            tokenizer,
            common.SEQ_LEN,
            limit_tokens=limit,
            num_proc=args.num_proc,
        )
        rows.save_to_disk(str(args.out / "data" / split))
        counts[split] = len(rows)
    packed = time.perf_counter()
    files = {"train": train_docs, "heldout": heldout_docs}
    common.write_log(
        args.out,
        "01_tokenizer",
        started,
        source=args.source,
        vocab_size=len(tokenizer),
        seq_len=common.SEQ_LEN,
        heldout_fraction=data.HELDOUT_FRACTION,
        documents={k: len(v) for k, v in files.items()},
        characters={k: int(np.sum(v["chars"])) for k, v in files.items()},
        tokens={k: v * common.SEQ_LEN for k, v in counts.items()},
        seconds_by_part={
            "read": round(read - started, 1),
            "tokenizer": round(trained - read, 1),
            "pack": round(packed - trained, 1),
        },
    )


def train_tokenizer(docs: Any, vocab_size: int, sample_chars: float) -> Any:
    """Byte-level BPE; `<s>` is bos and eos."""
    from transformers import PreTrainedTokenizerFast

    from benchmarks.byte_level_bpe import train_byte_level_bpe

    return PreTrainedTokenizerFast(
        tokenizer_object=train_byte_level_bpe(_sample(docs, sample_chars), vocab_size),
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<pad>",
        model_max_length=common.SEQ_LEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _sample(docs: Any, chars: float) -> Iterator[str]:
    total = 0
    for i in np.random.default_rng(0).permutation(len(docs)):
        text = docs[int(i)]["text"]
        yield text
        total += len(text)
        if total >= chars:
            return


if __name__ == "__main__":
    main()
