"""Models and data, as every command names, loads and writes them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError, check_count

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW = 2048  # tokens a row at most, unless asked for


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Where a command's model runs, and in what dtype."""
    parser.add_argument(
        "--device", help="where the model runs: cpu, cuda, cuda:1 ... (default: cuda if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as saved; demo: float32)",
    )


def add_data_flags(
    parser: argparse.ArgumentParser, required: bool, tokens: int | None = None, rows: bool = True
) -> None:
    """What a command reads, and how much of it; `rows`: in rows whose length the user may choose."""
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        required=required,
        help="a hub data set, a .txt/.json/.jsonl file or a folder of them, or 'python': this machine's own",
    )
    if rows:
        parser.add_argument(
            "--seq-len",
            metavar="T",
            type=int,
            help="tokens a row (default: the model's context, at most 2048)",
        )
    else:
        parser.set_defaults(seq_len=None)
    parser.add_argument("--limit-tokens", metavar="N", type=int, default=tokens, help="use at most N tokens")


def launched() -> Any:
    """accelerate's `Accelerator` where `accelerate launch` started this process together with others; else
    None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no")


def _device(options: argparse.Namespace) -> str:
    """Where the model is loaded: as asked for, or this process's own GPU. Weights that FSDP shards begin on
    the CPU: they are whole nowhere else."""
    import torch

    if options.device:
        return str(options.device)
    if (accelerator := launched()) is not None:
        return "cpu" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else str(accelerator.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(options: argparse.Namespace, name: str, base: str | None = None) -> tuple[Any, Any]:
    """The model, on its device and in eval mode, and its tokenizer; `base`: of routers alone."""
    import modlab

    device = _device(options)
    if device.startswith("meta"):
        raise ModlabError(f"--device {device}: nothing is computed there.")
    given = {"dtype": options.dtype} if options.dtype else {}
    loaded: tuple[Any, Any] = modlab.load(name, base=base, **given)
    model, tokenizer = loaded
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as problem:  # torch raises either for a device that is not there
        reason = str(problem).splitlines()[0]
        raise ModlabError(f"--device {device}: {reason}") from problem
    return model.eval(), tokenizer


def store_as_asked(options: argparse.Namespace, model: Any) -> None:
    """Sets how a converted model stores keys and values, where --kv-cache-dtype says it."""
    if options.kv_cache_dtype is not None:
        import modlab

        modlab.set_kv_cache_dtype(model, options.kv_cache_dtype)


def stored_as(model: Any) -> dict[str, str]:
    """How a model stores keys and values, as an entry of what a command finds."""
    routing = getattr(model, "mod", None)
    return {"kv_cache_dtype": "auto" if routing is None else routing.config.kv_cache_dtype}


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target that holds something already: a saved model is never mixed with another."""
    if folder.exists() and not folder.is_dir():
        raise ModlabError(f"{folder} is a file; give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ModlabError(
            f"the folder {folder} is not empty: name another one, or give --overwrite to replace it."
        )


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer into one folder, whole or not at all."""
    from modlab.saving.atomic import atomic_directory
    from modlab.saving.files import WEIGHT_PATTERNS

    with atomic_directory(folder, replaces=WEIGHT_PATTERNS) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


class Rows:
    """Packed rows of --data, and how they were made; iterates over long [T] tensors."""

    def __init__(self, dataset: Any, split: str, seq_len: int) -> None:
        self.dataset, self.split, self.seq_len = dataset, split, seq_len

    def __iter__(self) -> Iterator[Any]:
        return (row["input_ids"] for row in self.dataset)


def rows_of(options: argparse.Namespace, model: Any, tokenizer: Any) -> Rows:
    """The rows that --data, --split, --seq-len and --limit-tokens name. Fewer tokens than a row of the usual
    length are one row of so many."""
    from modlab.data import packed

    split = options.split or ("all" if Path(options.data).exists() else "heldout")
    length = row_length(options, model)
    limit = options.limit_tokens
    if limit is not None and check_count("--limit-tokens", limit, 2) < length and options.seq_len is None:
        length = limit
    dataset = packed(
        options.data, tokenizer, seq_len=length, split=None if split == "all" else split, limit_tokens=limit
    )
    return Rows(dataset, split, length)


def row_length(options: argparse.Namespace, model: Any) -> int:
    """Tokens a row: as asked for, within the model's context."""
    from modlab.hf.model import context_length

    context = context_length(model)
    length = min(context or ROW, ROW) if options.seq_len is None else options.seq_len
    if length < 2 or (context is not None and length > context):
        may = "2 or more tokens" if context is None else f"2 to {context} tokens, the context of this model"
        raise ModlabError(f"--seq-len {length}: rows must hold {may}.")
    return length
