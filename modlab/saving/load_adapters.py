"""Folders of PEFT adapters on a converted model: their base is loaded, converted and given the adapters.

`load` hands itself to `load_adapter`, since the base may be anything it loads: neither imports the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from modlab.errors import ModlabError
from modlab.routing.router import ROUTER
from modlab.routing.state import is_converted
from modlab.saving.description import Description, read_description
from modlab.saving.files import ADAPTER_CONFIG, CONFIG_FILE, ROUTER_FILE
from modlab.saving.json_files import read_object
from modlab.saving.restore import convert_as, set_described
from modlab.saving.routers import fill_routers, read_routers, room_for

Load = Callable[..., tuple[Any, Any]]


def load_adapter(folder: Path, load: Load, base: str | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """See `modlab.integrations.peft.load_adapter`.

    Args:
        load: loads the base, as `modlab.load` does: called with its name and `kwargs`.
    """
    peft = import_peft()
    described = read_object(folder / ADAPTER_CONFIG, "copy or save the adapters again")
    name = base or described.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ModlabError(
            f"{str(folder)!r} does not name its base model: "
            "modlab.integrations.peft.load_adapter(folder, base=...) takes it."
        )
    model, tokenizer = load(name, **kwargs)
    if (folder / CONFIG_FILE).is_file():
        _restore(model, read_description(folder / CONFIG_FILE, str(folder)), folder, described)
    elif not is_converted(model) and ROUTER in (described.get("modules_to_save") or ()):
        raise ModlabError(
            f"{str(folder)!r} holds routers, but neither it nor its base {name!r} says which layers are "
            "routed: save it with modlab.integrations.peft.save_adapter."
        )
    try:
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return peft.PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer
    except Exception as error:  # of PEFT, safetensors or the tokenizer: the files are anybody's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModlabError(f"the adapters in {str(folder)!r} cannot be loaded: {lines[0][:300]}") from error


def _restore(model: Any, description: Description, folder: Path, described: dict[str, Any]) -> None:
    """Converts the base if it is dense; thresholds and routers are those of the folder."""
    if is_converted(model):
        set_described(model, description, str(folder))
    else:
        convert_as(model, description, str(folder))
    file, name = folder / ROUTER_FILE, str(folder)
    if description.routers and not file.is_file():
        raise ModlabError(f"{name!r} has {CONFIG_FILE} but no {ROUTER_FILE}: copy the whole folder.")
    room = room_for(model)
    routers = read_routers(file, name, description.routers, room) if file.is_file() else {}
    fill_routers(model, routers, name, elsewhere=described.get("modules_to_save") or ())


def import_peft() -> Any:
    """The peft package."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModlabError(
            f"adapters need peft, which cannot be imported ({error}): pip install 'modlab[peft]'."
        ) from error
