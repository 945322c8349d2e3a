"""Small questions about a model, answered in one place: its device, its name, its context, eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modlab.saving.demos import demo_named


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter is."""
    device: torch.device = next(model.parameters()).device
    return device


def context_length(model: Any) -> int | None:
    """Tokens that the model reads at most (`max_position_embeddings` of its text config), or None where its
    config names no limit.

    Args:
        model: a model of transformers, or its config.
    """
    config = getattr(model, "config", model)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def model_name(model: Any) -> str:
    """A short name to show: the last part of the folder or hub id, a demo's own name, or the class."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
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
