"""LoRA on a converted model: adapters and routers are trained, saved and loaded together.

from modlab.integrations.peft import lora_config, save_adapter

model = peft.get_peft_model(modlab.convert(base), lora_config(base, r=16))
...                                   # modlab.train, or a Trainer with MoDCallback
save_adapter(model, "my-adapter")     # a few MB
model, tokenizer = modlab.load("my-adapter")
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from modlab.conversion.convert import ROUTER
from modlab.errors import ModlabError
from modlab.integrations.trainer import converted_model
from modlab.routing.state import is_converted, set_threshold
from modlab.saving.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    atomic_directory,
    convert_as_described,
    describe_routing,
    load,
    read_description,
)


def lora_config(model: torch.nn.Module, **settings: Any) -> Any:
    """A `peft.LoraConfig` that trains and saves the routers of `model` beside the adapters.

    Args:
        model: a converted model.
        settings: of `LoraConfig`. `target_modules` is "all-linear" by default.

    Raises:
        ModlabError: the model is dense, or peft is not installed.
    """
    converted_model(model)
    saved = [*(settings.pop("modules_to_save", None) or ()), ROUTER]
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings}
    return _peft().LoraConfig(modules_to_save=list(dict.fromkeys(saved)), **settings)


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Saves adapters and routers of a PEFT model, and what was converted and how; all or nothing.

    `model.save_pretrained` alone leaves the latter out, so that only a base that was saved converted can
    take the adapters again.

    Args:
        model: a `PeftModel` around a converted model.
        folder: `modlab.load` reads it, `PeftModel.from_pretrained` too, given the base converted.
    """
    converted = converted_model(model)
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        describe_routing(converted, temporary)


def load_adapter(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """The base model, converted, with the adapters of a folder on it; `modlab.load(folder)` calls this.

    Args:
        folder: as `save_adapter` wrote it, or as PEFT did where the base was saved converted.
        base: folder or hub id of the base model; by default what the adapter names.
        kwargs: for loading the base, as in `modlab.load`.

    Returns:
        (PeftModel in eval mode, tokenizer). `model.merge_and_unload()` gives the converted model without
        adapters.

    Raises:
        ModlabError: peft is not installed, the base cannot be loaded, or nothing says how to convert it.
    """
    peft, folder = _peft(), Path(folder)
    described = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = base or described.get("base_model_name_or_path")
    if not name:
        raise ModlabError(
            f"{str(folder)!r} does not name its base model: "
            "modlab.integrations.peft.load_adapter(folder, base=...) takes it."
        )
    loaded: tuple[Any, Any] = load(name, **kwargs)
    model, tokenizer = loaded
    if (folder / CONFIG_FILE).is_file():
        if is_converted(model):
            set_threshold(model, read_description(folder / CONFIG_FILE, str(folder))[1])
        else:
            convert_as_described(model, folder)
    elif not is_converted(model) and ROUTER in (described.get("modules_to_save") or ()):
        raise ModlabError(
            f"{str(folder)!r} holds routers, but neither it nor its base {str(name)!r} says which layers are "
            "routed: save it with modlab.integrations.peft.save_adapter."
        )
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModlabError(
            f"adapters need peft, which cannot be imported ({error}): pip install 'modlab[peft]'."
        ) from error
