"""Small questions about a model, answered in one place: device, name, context, vocabulary, eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modlab.errors import ModlabError
from modlab.saving.demos import demo_named


def device_of(module: Any) -> torch.device:
    """Where a model or one of its modules computes: where its first parameter is, or, of one whose weights
    accelerate brings in for each call (offloading), where it brings them."""
    device: torch.device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (where := getattr(one, "execution_device", None)) is not None:
                return torch.device(where)
    return device


def check_model(model: Any) -> None:
    """Raises ModlabError for what is no model, such as the name of one."""
    if not (hasattr(model, "parameters") and hasattr(model, "config")):
        name = f": load it first, modlab.load({model!r:.60})" if isinstance(model, str) else ""
        raise ModlabError(f"a model of transformers is needed, not {type(model).__name__}{name}.")


def context_length(model: Any) -> int | None:
    """Tokens that the model reads at most (`max_position_embeddings` of its text config), or None where there
    is no limit: the config names none, or rotary frequencies follow the length of the text (dynamic NTK).

    Args:
        model: a model of transformers, or its config.
    """
    config = _text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0 or "dynamic" in _rotary_kinds(config):
        return None
    return limit


def beyond_context(model: Any) -> str:
    """What to do about a text that is longer than the context: advice that keeps the model what it is.

    A larger `max_position_embeddings` changes nothing else where rotary frequencies are fixed; LongRoPE
    scales by it, and a table of positions does not grow.
    """
    kinds = _rotary_kinds(_text_config(model))
    if kinds and kinds <= {"default", "linear", "yarn", "llama3"}:
        return (
            "shorten it, or raise config.max_position_embeddings: the rotary positions go on, though the "
            "model may not have been trained on them"
        )
    return "shorten it"


def vocabulary_size(model: Any) -> int | None:
    """Tokens that the model knows: ids lie below this; None where its config does not say."""
    size = getattr(_text_config(model), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", model)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _rotary_kinds(config: Any) -> set[str]:
    """The kinds of rotary scaling in use, empty without rotary positions; layers may differ."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = bool(parameters) and all(isinstance(value, dict) for value in parameters.values())
    return {
        str(rope.get("rope_type", rope.get("type", "default")))
        for rope in (parameters.values() if nested else [parameters])
        if rope
    }


def model_name(model: Any) -> str:
    """A short name to show: the last part of the folder or hub id, a demo's own name, or the class.

    A model whose routers lie in a folder of their own has that folder's name, not its base's.
    """
    routers = getattr(getattr(model, "mod", None), "source", "")
    name = str(routers or getattr(model.config, "_name_or_path", "") or "")
    return demo_named(name) or Path(name).name or type(model).__name__


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is in its own mode again (a frozen dropout, an adapter).

    Gradients are another matter: use `torch.no_grad()` where none are wanted.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
