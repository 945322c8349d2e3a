"""torch.compile for the parts of a decoding step; what it cannot take runs as it is, and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Function = Callable[..., Any]


class Compiler:
    """Makes the functions of one captured step fast.

    Args:
        enabled: False gives every function back as it is.

    Attributes:
        eager: by name, why a function that was to be compiled whole runs as it is.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.eager: dict[str, str] = {}
        self._whole: dict[str, Function] = {}

    def layer(self, function: Function) -> Function:
        """`function`, which may run uncompiled in between where it has to."""
        return torch.compile(function, dynamic=False) if self.enabled else function

    def whole(self, name: str, function: Function) -> Function:
        """`function` compiled in one piece, or as it is if that fails: it is small, and no reason to go
        without the rest. `name` tells the functions of a step apart, from one pass over it to the next.
        """
        if self.enabled and name not in self._whole:
            self._whole[name] = self._tried(name, function)
        return self._whole.get(name, function)

    def _tried(self, name: str, function: Function) -> Function:
        fast = torch.compile(function, dynamic=False, fullgraph=True)

        def run(*args: Any, **kwargs: Any) -> Any:
            if name not in self.eager:
                try:
                    return fast(*args, **kwargs)
                except Exception as error:  # what is wrong with the function itself shows below
                    self.eager[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            return function(*args, **kwargs)

        return run


def beside_layers(decoder: nn.Module, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The decoder's own modules that compute something in every step: rotary tables, the final norm.

    Not the list of layers, nor embeddings and linear maps, which are one kernel each, nor what has neither
    weights nor tables (dropout).
    """
    inner = set(layers)
    return {
        name: child
        for name, child in decoder.named_children()
        if not isinstance(child, (nn.Embedding, nn.Linear))
        and any(True for _ in (*child.parameters(), *child.buffers()))
        and inner.isdisjoint(child.modules())
    }
