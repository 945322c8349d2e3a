"""modlab_router.safetensors: all tensors that conversion adds to a model, the routers above all.

What conversion adds has ".mod_" in its name. Where PEFT has wrapped such a module the tensors of its own
(adapters, and copies that it trains and saves itself) are left to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modlab.errors import ModlabError
from modlab.hf.anatomy import WRAPPED
from modlab.routing.router import is_router
from modlab.saving.bits import unpack_routers
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from modlab.saving.fingerprint import sha256_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PEFTS_OWN = ("modules_to_save", "original_module")


def added_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict what conversion added, under the names of a model without adapters, on the CPU."""
    return {plain: state[name].detach().cpu().contiguous() for plain, name in added_names(state).items()}


def added_names(names: Iterable[str]) -> dict[str, str]:
    """Of a state dict's names those of what conversion added, by the name in a model without adapters."""
    added = {}
    for name in names:
        parts = name.split(".")
        if is_router(name) and not any(part in PEFTS_OWN or part.startswith("lora_") for part in parts):
            added[".".join(part for part in parts if part != "base_layer")] = name
    return added


def missing_of(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What conversion added to `model` and a state dict of these names lacks. A wrapper's part of a name
    (checkpointing, torch.compile) counts for nothing, as state dicts have it or not."""

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in WRAPPED)

    given = set(map(bare, added_names(names)))
    return [name for name in added_names(tensors_of(model)) if bare(name) not in given]


def check_none_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Whether a state dict that somebody gives for saving has all that conversion added to `model`.

    Args:
        model: converted, with or without adapters.
        names: in the state, as in the model itself.

    Raises:
        ModlabError: some are missing, so that what is saved could not be loaded.
    """
    if missing := missing_of(model, names):
        raise ModlabError(
            f"the state_dict given lacks {len(missing)} tensors that conversion added to the model, such as "
            f"{missing[0]}, and without them the folder could not be loaded: give the state of the whole "
            "model, accelerator.get_state_dict(model), and save in the process that holds it; or give none "
            "where the model is not sharded."
        )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name. Unlike `state_dict` it asks no module for them: quantised ones unpack
    their weights then, and a converted model takes it that its adapters are being saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def write_routers(added: dict[str, Tensor], folder: Path) -> None:
    """Writes what `added_in` found.

    Raises:
        ModlabError: some are not finite, so that the folder could not be loaded again.
    """
    for name, tensor in added.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModlabError(
                f"{name} holds NaN or infinity, as after a training that diverged, so the model is not "
                "saved: go back to an earlier checkpoint."
            )
    save_file(added, folder / ROUTER_FILE)


def room_for(model: nn.Module) -> int:
    """Bytes that a file of what was added to a converted model takes at most: as float64, with its header."""
    return 2**20 + 8 * sum(t.numel() for name, t in tensors_of(model).items() if is_router(name))


def read_routers(
    file: Path, name: str, expected: str | None = None, largest: int = 2**30
) -> dict[str, Tensor]:
    """The tensors of a routers' file.

    Args:
        file: what to read.
        name: of the folder, for errors.
        expected: its SHA-256; not compared if None.
        largest: bytes; a larger file is refused unread.

    Raises:
        ModlabError: it is too large or damaged, holds other things than finite floats, or has another hash.
    """
    try:
        if (size := file.stat().st_size) > largest:
            raise ValueError(f"{size:,} bytes, where at most {largest:,} are expected")
        routers = unpack_routers(load_file(file))
        found = sha256_of(file) if expected else None
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, ModlabError) as error:
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} is corrupt ({error}): copy the folder again."
        ) from error
    for key, tensor in routers.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise ModlabError(
                f"{ROUTER_FILE} in {name!r} is corrupt ({key} holds {_contents(tensor)}): copy the folder "
                "again."
            )
    if found != expected:
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} is not the one that {CONFIG_FILE} describes: the folder mixes two "
            "savings, or one of the files is corrupt. Copy or save it again."
        )
    return routers


def fill_routers(
    model: PreTrainedModel, routers: dict[str, Tensor], name: str, elsewhere: Collection[str] = ()
) -> None:
    """Gives a converted model what `read_routers` read from the folder `name`.

    Args:
        elsewhere: modules (`mod_router`) whose tensors may be missing, since another file has them.

    Raises:
        ModlabError: it is another model's.
    """
    own = {key: tensor for key, tensor in tensors_of(model).items() if is_router(key)}
    needed = {key for key in own if not set(key.split(".")).intersection(elsewhere)}
    if not needed <= routers.keys() <= own.keys():
        first = min((routers.keys() - own.keys()) | (needed - routers.keys()))
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} holds routers for other layers than this model has ({first}): the "
            "folder mixes two models, save it again."
        )
    other = next((key for key, router in routers.items() if router.shape != own[key].shape), None)
    if other is not None:
        raise ModlabError(
            f"{ROUTER_FILE} in {name!r} holds routers for another model: {other} is "
            f"{list(routers[other].shape)} there and {list(own[other].shape)} here."
        )
    if absent := next((key for key in routers if own[key].is_meta), None):
        raise ModlabError(
            f"{absent} cannot be loaded: its layer was offloaded (device_map), and holds nothing. Load the "
            "model onto devices alone."
        )
    with torch.no_grad():
        for key, tensor in routers.items():
            own[key].copy_(tensor)


def _contents(tensor: Tensor) -> str:
    return "NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
