"""Forward hooks: whose they are, and which of them have nothing to do while the engine generates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

IDLE = ("output_capturing_hook", "make_inputs_require_grads")
"""Hooks that transformers leaves in a model: recorders of hidden states, there for good once somebody has
asked for some, and the one that gives embeddings a gradient. No generation here asks for either.
"""


def is_watched(model: nn.Module, own: set[int]) -> bool:
    """Whether somebody has a forward hook on any part of the model: a recorder, `KVTracker`, a probe.

    Args:
        own: ids of the hooks by which modlab routes.
    """
    return any(
        key not in own and not _is_idle(hook)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
    )


@contextlib.contextmanager
def idle_aside(model: nn.Module) -> Iterator[None]:
    """Inside this block idle hooks are not in the model: a layer with one is compiled in pieces."""
    hooks: Any
    taken = [
        (hooks, key, hook)
        for module in model.modules()
        for hooks in (module._forward_hooks,)
        for key, hook in hooks.items()
        if _is_idle(hook)
    ]
    try:
        for hooks, key, _ in taken:
            del hooks[key]
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook


def _is_idle(hook: Any) -> bool:
    name = getattr(hook, "__qualname__", "").rpartition(".")[2]
    return name in IDLE and getattr(hook, "__module__", "").startswith("transformers.")
