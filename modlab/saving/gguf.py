"""Models that transformers has read from a GGUF file (`modlab.load(folder, gguf_file=...)`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError


def check_file(folder: Path, name: str) -> None:
    """Raises ModlabError if the GGUF file is not in `folder`, or nothing here can read it."""
    if not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise ModlabError(f"there is no file {name!r} in {str(folder)!r}; GGUF files there: {there}.")
    if importlib.util.find_spec("gguf") is None:
        raise ModlabError("transformers reads GGUF files by the gguf package: pip install 'modlab[gguf]'.")


def forget_file(model: Any) -> None:
    """Lets a model whose weights were unpacked be the plain one that it is, so that it can be saved:
    transformers leaves the marks of a quantised model on it. One whose weights stayed packed keeps them."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or _method(quantizer) != "gguf" or getattr(quantizer, "packed_modules", None):
        return
    quantizer.remove_quantization_config(model)


def check_saving(model: Any) -> None:
    """Raises ModlabError for a quantised model that transformers cannot write."""
    forget_file(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_serializable():
        return
    method = _method(quantizer)
    cure = "save the routers alone, which is a few KB: modlab.save_routers(model, folder, base_model=...)"
    if method == "gguf":
        cure += ", or load it with quantization_config=transformers.GgufConfig(dequantize=True) and save that"
    raise ModlabError(f"this model is quantised by {method} and not serializable by transformers: {cure}.")


def _method(quantizer: Any) -> str:
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))
