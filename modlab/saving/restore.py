"""A dense model becomes again the converted one that a folder describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.cache.range import RANGE
from modlab.conversion.convert import convert, revert
from modlab.conversion.ranges import FEW_TOKENS, begin_rounding, check_rounding, set_kv_cache_dtype
from modlab.errors import ModlabError
from modlab.routing.state import routing_of, set_threshold
from modlab.saving.base_check import check_base
from modlab.saving.demos import folder_named
from modlab.saving.description import Description, read_description
from modlab.saving.files import CONFIG_FILE, ROUTER_FILE
from modlab.saving.fingerprint import check_fingerprints
from modlab.saving.hub import file_of
from modlab.saving.routers import fill_routers, read_routers, room_for
from modlab.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def restore_routers(
    model: PreTrainedModel, source: str, base: str | None = None, **hub_arguments: Any
) -> PreTrainedModel:
    """Converts a model that was loaded dense, if its folder says so, and loads its routers.

    Args:
        model: dense, with the weights of `source`, or of the base that `source` names.
        source: local folder or hub id.
        base: where the weights came from, if not from what `source` names.
        hub_arguments: revision, token, cache_dir ... of a hub id.

    Raises:
        ModlabError: the routers or their description are missing, damaged, or another model's. The model is
            dense then.
    """
    described = file_of(source, CONFIG_FILE, **hub_arguments)
    if described is None:
        return model
    weights = file_of(source, ROUTER_FILE, **hub_arguments)
    description = as_it_can_be_stored(model, read_description(Path(described), source), source)
    if weights is None:
        raise ModlabError(f"{source!r} has {CONFIG_FILE} but no {ROUTER_FILE}: copy the whole folder.")
    if base is None:
        _check_weights(description, Path(described), source)
    check_base(model, description.base, source)
    convert_as(model, description, source)
    try:
        routers = read_routers(Path(weights), source, description.routers, room_for(model))
        if description.config.kv_cache_dtype == "auto":  # here, whatever it was when it was saved
            routers = {name: tensor for name, tensor in routers.items() if RANGE not in name.split(".")}
        fill_routers(model, routers, source)
    except ModlabError:
        revert(model)
        raise
    if base is not None:
        model.mod_base_model = base  # type: ignore[assignment]
    return model


def as_it_can_be_stored(model: PreTrainedModel, description: Description, name: str) -> Description:
    """The description of the folder `name`; with a word, keys and values in the model's own type where they
    cannot be stored as it says, since this model's heads are shared across ranks."""
    if description.config.kv_cache_dtype == "auto":
        return description
    try:
        check_rounding(model, description.config.kv_cache_dtype)
    except ModlabError as error:
        warn(
            f"{name!r} stores keys and values in fewer bits; here they stay in the model's own type. {error}"
        )
        return description._replace(config=replace(description.config, kv_cache_dtype="auto"))
    return description


def convert_as(model: PreTrainedModel, description: Description, name: str) -> None:
    """Converts a dense model as `description` of the folder `name` says; the routers are new.

    Raises:
        ModlabError: this model cannot be converted so, or other layers would be routed than were. It is dense
            then.
    """
    convert(model, replace(description.config, kv_cache_dtype="auto"))
    try:
        set_described(model, description, name)
    except ModlabError:
        revert(model)
        raise
    model.mod_base_model = description.base_model  # type: ignore[assignment]
    routing_of(model).base_trained = description.base_trained
    routing_of(model).trained = description.trained


def set_described(model: PreTrainedModel, description: Description, name: str) -> None:
    """Gives a converted model the thresholds of the folder `name`, and makes room for ranges of keys and
    values in fewer bits where it has them; it has to route the same layers.

    Raises:
        ModlabError: it does not, or cannot store keys and values so.
    """
    layers = set(routing_of(model).layers)
    if other := layers ^ description.thresholds.keys():
        layer = min(other)
        raise ModlabError(
            f"{CONFIG_FILE} in {name!r} is another model's or damaged: it has "
            f"{'no threshold' if layer in layers else 'a threshold'} for layer {layer}, and this model "
            f"routes {sorted(layers)}. Copy or save the folder again."
        )
    dtype = description.config.kv_cache_dtype
    if dtype == "auto" or routing_of(model).ranges:
        set_kv_cache_dtype(model, dtype)
    else:
        begin_rounding(model, dtype, FEW_TOKENS)  # what was measured is in the folder
    if not routing_of(model).skip.decides_itself:
        set_threshold(model, description.thresholds)


def load_routers(model: PreTrainedModel, file: Path) -> None:
    """Gives a converted model the routers of a file that `save_pretrained` wrote.

    Raises:
        ModlabError: the file is missing, damaged, or another model's.
    """
    if not file.is_file():
        raise ModlabError(f"there are no routers at {str(file)!r}: copy the whole checkpoint there.")
    described, name = file.parent / CONFIG_FILE, str(file.parent)
    expected = read_description(described, name).routers if described.is_file() else None
    fill_routers(model, read_routers(file, name, expected, room_for(model)), name)


def _check_weights(description: Description, described: Path, source: str) -> None:
    """Of a folder its own weights, for routers alone those of their base if that is a folder of this machine;
    of a hub id those that were downloaded."""
    folder, expected = described.parent, description.weights
    if not (folder / "config.json").is_file():
        folder, source = folder_named(description.base_model or ""), str(description.base_model)
        if not folder.is_dir():
            return
    elif not Path(source).is_dir():
        expected = {file: digest for file, digest in expected.items() if (folder / file).is_file()}
    check_fingerprints(expected, folder, source)
