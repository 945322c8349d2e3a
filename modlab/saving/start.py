"""What another conversion of the same model has learnt, as the start of further training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modlab.cache.range import RANGE
from modlab.errors import ModlabError
from modlab.routing.router import ROUTER, is_router
from modlab.routing.state import routing_of, set_keep_recent, set_threshold
from modlab.saving.base_check import check_base
from modlab.saving.demos import ROUTERS, folder_named
from modlab.saving.description import read_description
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from modlab.saving.hub import file_of
from modlab.saving.routers import read_routers, room_for, tensors_of


def start_from(model: Any, source: str | Path, **hub_arguments: Any) -> list[str]:
    """Gives a converted model the routers (and trained projections) of another conversion of the same base,
    wherever both have them, with their thresholds: train K/V routing first, then add leaving on top.

    What the source does not have stays as conversion made it. Routers above the point where prompt tokens
    leave read another state than those of `skip="kv"` were trained on: for them it is a start, no more.

    Args:
        model: converted, not trained yet.
        source: folder, hub id or name of routers that ship, as `modlab.load` takes it.
        hub_arguments: revision, token, cache_dir ... of a hub id.

    Returns:
        names of the tensors that were taken.

    Raises:
        ModlabError: no routers there, another base, or nothing that fits this conversion. The model is as it
            was then.
    """
    name = str(folder_named(str(source)))
    try:
        described, weights = (file_of(name, file, **hub_arguments) for file in (CONFIG_FILE, ROUTER_FILE))
    except OSError as error:
        raise ModlabError(
            f"there are no routers to start from at {str(source)!r}: no such folder, no hub id that can be "
            f"had, and not one of those that ship ({', '.join(ROUTERS)})."
        ) from error
    if described is None or weights is None:
        raise ModlabError(
            f"{str(source)!r} holds no routers to start from: it needs {CONFIG_FILE} and {ROUTER_FILE}, as "
            "modlab.save_routers or a training run's folder model/ has them."
        )
    description = read_description(Path(described), name)
    check_base(model, description.base, name)
    own = {key: tensor for key, tensor in tensors_of(model).items() if is_router(key)}
    found = read_routers(Path(weights), name, description.routers, 2**30 + room_for(model))
    here, there = _shapes(own), _shapes(found)
    taken = [
        key
        for key in found
        if here.get(_module(key)) == there[_module(key)] and not _module(key).endswith(RANGE)
    ]  # ranges of keys and values were measured on this model
    if not taken:
        raise ModlabError(
            f"nothing of {str(source)!r} fits this conversion: it was made with {_form(description.config)}, "
            f"this model has {_form(routing_of(model).config)}. Convert with the same gates and "
            "router_hidden."
        )
    routing = routing_of(model)
    if routing.recent is not None and description.config.recent_stored:
        # Its thresholds count on them. First, as a sliding window may refuse so many.
        set_keep_recent(model, description.config.keep_recent)
    routing.forget_origin()
    with torch.no_grad():
        for key in taken:
            own[key].copy_(found[key])
    routers = [key.split(".") for key in taken if f".{ROUTER}." in key]
    routed = {int(part) for parts in routers for part in parts if part.isdigit()}
    if routed and not routing_of(model).skip.decides_itself:
        thresholds = {i: p for i, p in description.thresholds.items() if i in routed}
        set_threshold(model, routing_of(model).thresholds | thresholds)
    return sorted(taken)


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, dict[str, torch.Size]]:
    """By module, and in it by name: a router is taken as a whole or not at all."""
    found: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in tensors.items():
        found.setdefault(_module(key), {})[key] = tensor.shape
    return found


def _form(config: Any) -> str:
    return f"skip={config.skip!r}, gates={config.gates!r}, router_hidden={config.router_hidden}"
