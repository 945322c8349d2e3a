"""The names by which a folder of a converted model is known. Light: any room may ask.

A folder holds what plain transformers reads (config.json, model.safetensors, ...) plus

    modlab_config.json            MoDConfig, current thresholds, the model it was converted from, hashes
    modlab_router.safetensors     what the conversion added, routers above all
    README.md                     the model card

and a marker in config.json by which `AutoModelForCausalLM` finds the routers once modlab is imported. Without
modlab the same folder is the dense model.

A folder of routers alone (`save_routers`) has the last three files only, and names the base model. A folder
of PEFT adapters on a converted model has PEFT's two files and the first two of these.
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_FILE = "modlab_config.json"
ROUTER_FILE = "modlab_router.safetensors"
CARD_FILE = "README.md"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
WEIGHT_PATTERNS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")

METHOD = "modlab"
MARKER = {"quant_method": METHOD}
"""The entry "quantization_config" of a converted folder's config.json, see integrations/auto_model.py."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str | None) -> bool:
    """Whether this is a hub id and not a folder of this machine."""
    return bool(name) and HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def weight_files(folder: Path) -> list[Path]:
    """The files of `folder` that hold the weights of a whole model, or say where they lie."""
    return sorted({file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)})


def holds_model(folder: Path) -> bool:
    """Whether `folder` is a model's own, not one of routers or adapters alone."""
    return (folder / "config.json").is_file() or bool(weight_files(folder))
