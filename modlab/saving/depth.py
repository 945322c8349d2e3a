"""Refuses a config.json that asks for more layers than its folder can hold, before transformers builds them.

A damaged or hostile number there would keep a machine busy for hours. Light.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError
from modlab.saving.json_files import read_object

MOST_LAYERS = 10_000
"""Where the tensors cannot be counted."""
LONGEST_HEADER = 100 * 2**20  # bytes, safetensors' own limit
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "decoder_layers")


def check_depth(folder: Path) -> None:
    """Raises ModlabError if config.json in `folder` is no JSON object, or says that the model has more layers
    than its weights have tensors."""
    config = read_object(folder / "config.json", "copy or download the folder again", finite=False)
    tensors = _count_tensors(folder)
    for name, layers in depths(config):
        if layers > min(tensors or MOST_LAYERS, MOST_LAYERS):
            held = f"the weights there hold {tensors:,} tensors" if tensors else "no model has so many"
            raise ModlabError(
                f"config.json in {str(folder)!r} says {name}={layers:,}, and {held}: copy or download the "
                "folder again."
            )


def depths(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """What a config and those inside it say about numbers of layers."""
    for name, value in config.items():
        if name in DEPTHS and isinstance(value, int):
            yield name, value
        elif name.endswith("_config") and isinstance(value, dict):
            yield from depths(value)


def _count_tensors(folder: Path) -> int | None:
    """Of the safetensors files in `folder`; None if there are none, or none to be read (loading tells)."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file() and not (folder / "model.safetensors").is_file():
            return len(read_object(index, "", largest=LONGEST_HEADER).get("weight_map", {}))
        found = sum(_tensors_in(file) for file in folder.glob("model*.safetensors"))
        return found or None
    except (ModlabError, OSError, ValueError, TypeError, RecursionError):
        return None


def _tensors_in(file: Path) -> int:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= LONGEST_HEADER else b""
    return len(json.loads(header).keys() - {"__metadata__"})
