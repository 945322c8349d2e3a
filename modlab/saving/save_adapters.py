"""Routers go with PEFT adapters wherever PEFT saves them.

PEFT's `save_pretrained` writes the adapters and their config and knows nothing of a conversion, so that
adapters with a plain `LoraConfig` on a converted model would load on the dense one, without a word. It does
ask the model for its state dict before, and the config to save itself; at the first the config learns to
describe the conversion at the second.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modlab.errors import ModlabError
from modlab.routing.state import is_converted
from modlab.saving.description import write_description
from modlab.saving.files import ROUTER_FILE, holds_model
from modlab.saving.routers import added_in, tensors_of, write_routers

_of_thread = threading.local()
"""`described`: whether this thread is saving adapters and describes their conversion itself."""


def describe_adapters(model: Any, folder: Path) -> None:
    """Adds to a folder of PEFT's how the model was converted, and the routers unless PEFT saved them.

    A folder that holds a model, into which PEFT writes if it is told to, has a description of its own.
    """
    if holds_model(folder):
        return
    if added := added_in(tensors_of(model)):
        write_routers(added, folder)
    else:
        (folder / ROUTER_FILE).unlink(missing_ok=True)  # of adapters that lay there before
    write_description(model, folder)


@contextlib.contextmanager
def described_by_caller() -> Iterator[None]:
    """Inside this block the caller writes down the conversion, whatever kind of adapters PEFT saves."""
    _of_thread.described = True
    try:
        yield
    finally:
        _of_thread.described = False


def let_routers_travel(model: Any, prefix: str = "") -> None:
    """Has the configs of the model's adapters describe its conversion when they are saved next.

    Args:
        prefix: under which the state dict is asked for. PEFT's, on a model that knows of no adapters, means
            learned prompts: their config is out of reach, so the caller is told.
    """
    adapters = model.__dict__.get("peft_config")
    if prefix.startswith("base_model.") and not adapters and not getattr(_of_thread, "described", False):
        warnings.warn(
            "PEFT knows nothing of this model's routers and keeps learned prompts apart from it: what its "
            "save_pretrained writes loads on the dense model. "
            "modlab.integrations.peft.save_adapter(model, folder) saves the routers with them.",
            stacklevel=2,
        )
    for config in (adapters or {}).values():
        if not isinstance(config, CarriesRouters):
            peft_class: Any = type(config)
            names = {
                "__module__": peft_class.__module__,
                "__qualname__": peft_class.__qualname__,
                "peft_class": peft_class,
            }
            config.__class__ = type(peft_class.__name__, (CarriesRouters, peft_class), names)
        config.__dict__["mod_model"] = weakref.ref(model)


class CarriesRouters:
    """Mixed into the class of an adapter's config (of that object only), until it is saved: the user may have
    given the same config to another model."""

    peft_class: Any

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PEFT's; the converted model is described in the same folder."""
        known = self.__dict__.pop("mod_model", None)
        self.__class__ = type(self).peft_class
        self.save_pretrained(save_directory, **kwargs)
        model = known() if known is not None else None
        if model is not None and is_converted(model) and _has(model, self):
            describe_adapters(model, Path(save_directory))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain config: it belongs to no model."""
        state = {name: value for name, value in self.__dict__.items() if name != "mod_model"}
        return object.__new__, (type(self).peft_class,), state


def _has(model: Any, config: Any) -> bool:
    return any(one is config for one in (model.__dict__.get("peft_config") or {}).values())


def check_no_adapters(model: Any, cure: str) -> None:
    """Raises ModlabError if adapters are on the model, which then is not the one to save."""
    if model.__dict__.get("peft_config"):
        raise ModlabError(
            f"this {type(model).__name__} carries PEFT adapters, and would be saved with the names of its "
            f"weights changed and without them: {cure}, or merge them first (merge_and_unload())."
        )
