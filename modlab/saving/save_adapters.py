"""Routers go with PEFT adapters wherever PEFT saves them.

PEFT's `save_pretrained` writes the adapters and their config and knows nothing of a conversion, so that
adapters with a plain `LoraConfig` on a converted model would load on the dense one, without a word. It does
ask the model for its state dict before, and the config to save itself; at the first the config learns to
describe the conversion at the second.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError
from modlab.routing.state import is_converted
from modlab.saving.description import write_description
from modlab.saving.routers import added_in, write_routers


def describe_adapters(model: Any, folder: Path) -> None:
    """Adds to a folder of PEFT's how the model was converted, and the routers unless PEFT saved them."""
    if added := added_in(model.state_dict()):
        write_routers(added, folder)
    write_description(model, folder)


def let_routers_travel(model: Any) -> None:
    """From here on the configs of a converted model's adapters describe its conversion when saved."""
    for config in (model.__dict__.get("peft_config") or {}).values():
        if not isinstance(config, CarriesRouters):
            dense_class: Any = type(config)
            names = {"__module__": dense_class.__module__, "__qualname__": dense_class.__qualname__}
            config.__class__ = type(dense_class.__name__, (CarriesRouters, dense_class), names)
        config.__dict__["mod_model"] = weakref.ref(model)


class CarriesRouters:
    """Mixed into the class of an adapter's config (of that object only)."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PEFT's; the converted model is described in the same folder."""
        peft: Any = super()
        peft.save_pretrained(save_directory, **kwargs)
        known = self.__dict__.get("mod_model")
        model = known() if known is not None else None
        if model is None or not is_converted(model):
            return
        if any(config is self for config in (model.__dict__.get("peft_config") or {}).values()):
            describe_adapters(model, Path(save_directory))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain config: it belongs to no model."""
        state = {name: value for name, value in self.__dict__.items() if name != "mod_model"}
        return object.__new__, (type(self).__mro__[2],), state


def check_no_adapters(model: Any, cure: str) -> None:
    """Raises ModlabError if adapters are on the model, which then is not the one to save."""
    if model.__dict__.get("peft_config"):
        raise ModlabError(
            f"this {type(model).__name__} carries PEFT adapters, and would be saved with the names of its "
            f"weights changed and without them: {cure}, or merge them first (merge_and_unload())."
        )
