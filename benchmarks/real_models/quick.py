"""`recipe("quick")` on a GPU: how long the fit takes, and the routers that it leaves, to be measured.

    python -m benchmarks.real_models quick --model FOLDER --texts TEXTS --out DIR
    python -m benchmarks.real_models measure --model FOLDER --routers DIR/routers --arm quick --out DIR ...

Loading and tokenising are not in the seconds of a fit; tokenising is told by itself. The first fit compiles
its kernels, so a second one is timed as well: both are told.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modlab
from benchmarks.real_models import training_speed
from benchmarks.real_models.measured.pieces import Folder
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.measured.run import FIT, origin
from benchmarks.real_models.run import rounded
from modlab.training.contexts import contexts, prompt_ids
from modlab.training.fit import ON_CPU, ON_GPU, copy_length

SHAPE = "llama-3-8b"
"""What is fitted where no model is given, with random weights."""


def run(
    folder: Path | None, texts: str | None, out: Path, device: str = "cuda", *, repeats: int = 2,
    tokens: int | None = None, context: int | None = None, commit: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fits routers, unless `out` says that it was done, and writes the record and the routers there.

    Args:
        folder: of the dense model; None: random weights of an 8B shape, on random tokens.
        texts: a source of `modlab.data.packed`.
        repeats: fits, one after the other; the routers are the last one's.
        tokens, context: as of `FitConfig`.

    Returns:
        the record.

    Raises:
        ModlabError: a model's folder without texts.
    """
    left = Folder(out)
    if left.done(FIT):
        return left.read(FIT)
    if folder is not None and texts is None:
        raise modlab.ModlabError("--texts: name the texts that routers are fitted to.")
    began = time.monotonic()
    model, tokenizer = _dense(folder, device)
    loaded = time.monotonic() - began
    name = SHAPE if folder is None else folder.name
    mod_config, config = modlab.recipe("quick", model, tokens=tokens, context=context)
    began = time.monotonic()
    rows = _rows(model, tokenizer, texts, config)
    row = {
        "model": name, "arm": "quick", "parameters": sum(p.numel() for p in model.parameters()),
        "load_seconds": loaded, "tokenise_seconds": time.monotonic() - began, "context": rows.shape[1],
    }  # fmt: skip
    modlab.convert(model, mod_config)
    row |= _fits(model, tokenizer, rows, config, repeats)
    if folder is not None:
        modlab.save_routers(model, out / "routers", base_model=str(folder))
    record = {"what": FIT, **origin(Product(name, model, tokenizer), commit), "rows": [row]}
    left.write(FIT, rounded(record))
    return left.read(FIT)


def _dense(folder: Path | None, device: str) -> tuple[Any, Any]:
    if folder is None:
        return training_speed.load(None, device), None
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, tokenizer = modlab.load(folder, dtype=dtype)
    moved: Any = model
    return moved.to(device).eval(), tokenizer


def _rows(model: Any, tokenizer: Any, texts: str | None, config: modlab.FitConfig) -> Tensor:
    """What a fit by these settings draws, long [rows, tokens of a copy], before the clock starts."""
    usual = ON_GPU if model.device.type == "cuda" else ON_CPU
    length = copy_length(model, config.context, usual["context"], len(prompt_ids(model, tokenizer)))
    tokens = config.tokens or usual["tokens"]
    if texts is not None:
        return contexts(model, texts, tokenizer, length, tokens, config.seed)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (tokens // length, length), generator=generator)


def _fits(model: Any, tokenizer: Any, rows: Tensor, config: modlab.FitConfig, repeats: int) -> dict[str, Any]:
    """Seconds of each fit, what the last one found, and the peak of memory of all."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    config.context = rows.shape[1]
    found = [modlab.fit_routers(model, rows, config, tokenizer=tokenizer) for _ in range(repeats)]
    last = found[-1]
    return {
        "seconds": [one.seconds for one in found], "tokens": last.tokens, "r2": last.r2,
        "r2_linear": last.r2_linear, "keep_ratio": last.keep_ratio,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
    }  # fmt: skip
