"""Saves converted models: all of one, or its routers alone; each folder all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError
from modlab.routing.state import routing_of
from modlab.saving.atomic import atomic_directory
from modlab.saving.base_check import describe_base
from modlab.saving.card import write_card
from modlab.saving.demos import folder_named
from modlab.saving.description import write_description
from modlab.saving.files import ADAPTER_CONFIG, MARKER, WEIGHT_PATTERNS, holds_model
from modlab.saving.fingerprint import fingerprints
from modlab.saving.gguf import check_saving
from modlab.saving.routers import added_in, check_none_missing, tensors_of, write_routers
from modlab.saving.save_adapters import check_no_adapters, describe_adapters, described_by_caller

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from modlab.measure import Evaluation


def save_converted(
    model: Any,
    save_dense: Callable[..., Any],
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    evaluation: Evaluation | None = None,
    **kwargs: Any,
) -> None:
    """Writes a converted model; `RoutedModel.save_pretrained` calls this with the dense class's own method.

    Args:
        evaluation: figures for the model card, as `modlab.measure.evaluate` gives them.

    Raises:
        ModlabError: `state_dict` lacks some of what conversion added.
    """
    if not is_main_process:
        return
    if getattr(model, "_hf_peft_config_loaded", False):  # by add_adapter: transformers saves those alone
        with atomic_directory(save_directory) as folder:
            with described_by_caller():
                save_dense(folder, state_dict=state_dict, **kwargs)
            describe_adapters(model, folder, state_dict)
        return
    check_saving(model)
    check_no_adapters(model, "save the PeftModel around it, by its own save_pretrained")
    if state_dict is not None:
        check_none_missing(model, state_dict)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    added = added_in(state)
    with atomic_directory(save_directory, replaces=WEIGHT_PATTERNS) as folder:
        with _left_out(model, added):
            save_dense(folder, state_dict=state, **kwargs)
        write_routers(added, folder)
        write_description(model, folder, weights=fingerprints(folder))
        mark_converted(folder / "config.json")
        write_card(model, folder, Path(save_directory), evaluation)


def save_routers(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    base_model: str | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Writes the routers alone, a few KB: for a model whose other weights are still those of its base, as
    training with `TrainConfig(freeze_base=True)` leaves them. `modlab.load` puts them into the base again.

    Args:
        model: converted.
        save_directory: folder.
        base_model: what `modlab.load` is to load first: a hub id, a demo's name, or a folder. By default the
            hub id that the model came from. Giving it says that the weights there are this model's.
        evaluation: figures for the model card, as `modlab.measure.evaluate` gives them.

    Raises:
        ModlabError: the model did not come from the hub, or other weights than the routers were trained, and
            `base_model` is not given; or the folder holds a model.
    """
    routing = routing_of(model)
    for part in model.modules():
        check_no_adapters(part, "save both with modlab.integrations.peft.save_adapter")
    if base_model is None and routing.base_trained:
        raise ModlabError(
            "other weights than the routers of this model have been trained, or may have been: save all with "
            "save_pretrained, or give save_routers a base_model that has these very weights."
        )
    target = Path(save_directory)
    if holds_model(target):
        raise ModlabError(
            f"{str(target)!r} holds a model, which routers alone would not go with: give another folder."
        )
    if (target / ADAPTER_CONFIG).is_file():
        raise ModlabError(f"{str(target)!r} holds adapters: give the routers a folder of their own.")
    came_from: Any = model.mod_base_model
    base: str | None = base_model or came_from
    if base is None:
        raise ModlabError(
            "routers alone need to name the model that they are for, and this one did not come from the hub: "
            "give save_routers its base_model."
        )
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    at = folder_named(base)
    with atomic_directory(save_directory) as folder:
        write_routers(added_in(tensors_of(model)), folder)
        of_base = fingerprints(at) if at.is_dir() else None
        write_description(model, folder, base, of_base, describe_base(model))
        write_card(model, folder, target, evaluation, routers_of=base)


def mark_converted(config_json: Path) -> None:
    """Tells `AutoModelForCausalLM` that the folder holds a converted model; a truly quantised one keeps its
    own entry, and only `modlab.load` finds its routers."""
    values = json.loads(config_json.read_text(encoding="utf-8"))
    if values.setdefault("quantization_config", MARKER) == MARKER:
        config_json.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _left_out(model: Any, names: Iterable[str]) -> Iterator[None]:
    """transformers' `save_pretrained` inside this block leaves these weights out, also where a quantiser
    gathers them again."""
    before = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = {*(before or ()), *names}
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before
