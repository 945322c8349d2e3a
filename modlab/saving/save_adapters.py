"""Routers go with PEFT adapters wherever PEFT saves them.

PEFT's `save_pretrained` writes the adapters and their config and knows nothing of a conversion, so that
adapters with a plain `LoraConfig` on a converted model would load on the dense one, without a word. It does
ask the model for its state dict before, and the config to save itself; at the first the config learns to
describe the conversion at the second.

Where FSDP2 shards the model each process holds parts: what is saved is then given as a whole state, which all
processes have gathered (`accelerator.get_state_dict(model)`), and nothing is asked of the model itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError
from modlab.routing.state import is_converted
from modlab.saving.description import write_description
from modlab.saving.files import ROUTER_FILE, holds_model
from modlab.saving.routers import (
    added_in,
    added_names,
    check_none_missing,
    missing_of,
    tensors_of,
    write_routers,
)
from modlab.warn import warn

if TYPE_CHECKING:
    from torch import Tensor

WRAPPED = ("base_model.model.", "base_model.")
"""What a PEFT model puts before the names of the model in it; learned prompts put less."""

_of_thread = threading.local()
"""`described`: whether this thread is saving adapters and describes their conversion itself."""


def save_adapters(
    model: Any, converted: Any, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """PEFT's folder of adapters, with the routers and how the model was converted.

    Args:
        model: PEFT's, around `converted`.
        folder: written file by file.
        state: of `model`, whole, where FSDP2 shards it.

    Raises:
        ModlabError: this process holds parts of adapters or routers, and no state was given; or the state
            lacks routers.
    """
    if state is None:
        check_whole(converted)
        _refuse_parts(_of_adapters(model))
    else:
        _unwrapped(converted, state)  # refused before PEFT writes
    with described_by_caller():
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    describe_adapters(converted, folder, state)


def describe_adapters(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Adds to a folder of PEFT's how the model was converted, and the routers unless PEFT saved them.

    A folder that holds a model, into which PEFT writes if it is told to, has a description of its own.

    Args:
        state: of the model or of PEFT's around it, whole, where FSDP2 shards it.

    Raises:
        ModlabError: this process holds parts of the routers, and no state was given; or the state lacks
            routers that PEFT did not save.
    """
    if holds_model(folder):
        return
    if state is None:
        check_whole(model)
    if added := added_in(tensors_of(model) if state is None else _unwrapped(model, state)):
        write_routers(added, folder)
    else:
        (folder / ROUTER_FILE).unlink(missing_ok=True)  # of adapters that lay there before
    write_description(model, folder)


def _unwrapped(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of `model`, the one inside PEFT's.

    Raises:
        ModlabError: the state is empty, as other processes than the first may hold it, or lacks routers.
    """
    if not state:
        raise ModlabError(
            "the state_dict given is empty, and so would be the adapters: save in the process that holds the "
            "state of the whole model (accelerator.is_main_process)."
        )
    stripped = ({name.removeprefix(p): tensor for name, tensor in state.items()} for p in ("", *WRAPPED))
    named = next((one for one in stripped if not missing_of(model, one)), dict(state))
    check_none_missing(model, named)
    return named


def _of_adapters(model: Any) -> dict[str, Tensor]:
    """Of PEFT's model what it saves: what is trained, or has the name of an adapter or of its method. The
    base may lie in parts, as tensor parallelism leaves it."""
    adapters, method = set(model.peft_config), getattr(model.base_model, "prefix", None) or "lora_"
    return {
        name: tensor
        for name, tensor in tensors_of(model).items()
        if tensor.requires_grad or any(p in adapters or p.startswith(method) for p in name.split("."))
    }


def check_whole(model: Any) -> None:
    """Whether this process could write down what PEFT does not save of a converted model.

    Raises:
        ModlabError: it holds parts of the routers.
    """
    tensors = tensors_of(model)
    _refuse_parts({plain: tensors[name] for plain, name in added_names(tensors).items()})


def _refuse_parts(tensors: Mapping[str, Tensor]) -> None:
    if part := next((name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")), None):
        raise ModlabError(
            f"this process holds a part of {part}, as the model is sharded, and would save parts: let "
            "modlab.train save them (out=...), have PEFT save the routers as well (lora_config), or give "
            "modlab.integrations.peft.save_adapter a state_dict=accelerator.get_state_dict(model), for which "
            "all processes have to ask."
        )


@contextlib.contextmanager
def described_by_caller() -> Iterator[None]:
    """Inside this block the caller writes down the conversion, whatever kind of adapters PEFT saves, and in
    this thread nobody else does."""
    before = _described()
    _of_thread.described = True
    try:
        yield
    finally:
        _of_thread.described = before


def let_routers_travel(model: Any, prefix: str = "") -> None:
    """Has the configs of the model's adapters describe its conversion when they are saved next.

    Args:
        prefix: under which the state dict is asked for. PEFT's, on a model that knows of no adapters, means
            learned prompts: their config is out of reach, so the caller is told.
    """
    adapters = model.__dict__.get("peft_config")
    if prefix.startswith("base_model.") and not adapters and not _described():
        warn(
            "PEFT knows nothing of this model's routers and keeps learned prompts apart from it: what its "
            "save_pretrained writes loads on the dense model. "
            "modlab.integrations.peft.save_adapter(model, folder) saves the routers with them."
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
        if model is not None and is_converted(model) and _has(model, self) and not _described():
            describe_adapters(model, Path(save_directory))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a plain config: it belongs to no model."""
        state = {name: value for name, value in self.__dict__.items() if name != "mod_model"}
        return object.__new__, (type(self).peft_class,), state


def _described() -> bool:
    return getattr(_of_thread, "described", False)


def _has(model: Any, config: Any) -> bool:
    return any(one is config for one in (model.__dict__.get("peft_config") or {}).values())


def check_no_adapters(model: Any, cure: str) -> None:
    """Raises ModlabError if adapters are on the model, which then is not the one to save."""
    if model.__dict__.get("peft_config"):
        raise ModlabError(
            f"this {type(model).__name__} carries PEFT adapters, and would be saved with the names of its "
            f"weights changed and without them: {cure}, or merge them first (merge_and_unload())."
        )
