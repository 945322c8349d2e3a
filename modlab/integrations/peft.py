"""LoRA on a converted model: adapters and routers are trained, saved and loaded together.

from modlab.integrations.peft import lora_config, save_adapter

model = peft.get_peft_model(modlab.convert(base), lora_config(base, r=16))
...                                   # modlab.train, or a Trainer with MoDCallback
save_adapter(model, "my-adapter")     # a few MB
model, tokenizer = modlab.load("my-adapter")
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from modlab.errors import ModlabError
from modlab.execution.projections import PROJECTIONS, WholeProjection
from modlab.hf.anatomy import attention_name
from modlab.integrations.trainer import converted_model
from modlab.routing.router import is_router
from modlab.saving import load_adapters
from modlab.saving.atomic import atomic_directory
from modlab.saving.files import ROUTER_FILE, holds_model
from modlab.saving.load import load, load_base
from modlab.saving.load_adapters import import_peft
from modlab.saving.save_adapters import save_adapters


def lora_config(model: torch.nn.Module, **settings: Any) -> Any:
    """A `peft.LoraConfig` that trains and saves the routers of `model` with the adapters.

    Args:
        model: a converted model.
        settings: of `LoraConfig`. `target_modules` is "all-linear" by default. Projections that whole trained
            copies stand in for (`skip="prompt"` and `"kv+prompt"` without `leave_rank`) are excluded, as
            adapters there would never be called.

    Raises:
        ModlabError: the model is dense, or peft is not installed.
    """
    converted = converted_model(model)
    added = filter(is_router, dict(converted.named_parameters()))  # what is measured PEFT need not copy
    ours = {next(part for part in name.split(".") if part.startswith("mod_")) for name in added}
    saved = [*(settings.pop("modules_to_save", None) or ()), *sorted(ours)]
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings}
    if replaced := _replaced(converted):
        settings["exclude_modules"] = _either(settings.get("exclude_modules"), replaced)
    return import_peft().LoraConfig(modules_to_save=list(dict.fromkeys(saved)), **settings)


def _replaced(model: torch.nn.Module) -> list[str]:
    """Names of the base's projections that trained copies stand in for."""
    return [
        f"{name}.{attention_name(layer)}.{own}"
        for name, layer in model.named_modules()
        for own, trained in getattr(layer, PROJECTIONS, torch.nn.Module()).named_children()
        if isinstance(trained, WholeProjection)
    ]


def _either(excluded: Any, names: list[str]) -> Any:
    """`exclude_modules` as given, a pattern or names, and these names."""
    if isinstance(excluded, str):
        return f"(?:{excluded})|(?:.*\\.)?(?:{'|'.join(map(re.escape, names))})"
    return [*(excluded or ()), *names]


def save_adapter(
    model: Any, folder: str | os.PathLike[str], *, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Saves adapters and routers of a PEFT model, and what was converted and how; all or nothing.

    `model.save_pretrained` does the same, but file by file, as PEFT writes; for learned prompts (prompt
    tuning, p-tuning, adaption prompts) it cannot, and warns.

    Args:
        model: a `PeftModel` around a converted model.
        folder: `modlab.load` reads it, `PeftModel.from_pretrained` too, given the base converted.
        state_dict: of a model that FSDP2 shards, as `accelerator.get_state_dict(model)` gives it: all
            processes ask for it, one saves.

    Raises:
        ModlabError: the folder holds a model; or the model is sharded, and no state is given.
    """
    converted = converted_model(model)
    if holds_model(Path(folder)):
        raise ModlabError(f"{str(folder)!r} holds a model: give the adapters a folder of their own.")
    with atomic_directory(folder, replaces=(ROUTER_FILE,)) as temporary:
        save_adapters(model, converted, temporary, state_dict)


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
    if base is None:
        return load_adapters.load_adapter(Path(folder), load_base, **kwargs)
    return load_adapters.load_adapter(Path(folder), load, os.fspath(base), **kwargs)
