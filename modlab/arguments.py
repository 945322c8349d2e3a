"""The arguments of one call of a decoder layer, and how to cut them down to some of its tokens.

Every architecture passes its layers other things (rotary tables, positions, caches, masks), by position or by
name. One rule covers them: what has a time axis where the hidden states have theirs is gathered, the mask and
the cache are replaced, everything else passes through.

Shape letters: B batch rows, R rows of one group, T tokens in, S kept tokens, D model dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from modlab.errors import ModlabError

MASK_NAMES = ("attention_mask",)


@functools.cache
def forward_signature(module_class: Any) -> inspect.Signature:
    """Signature of `module_class.forward` without self."""
    signature = inspect.signature(module_class.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class LayerArguments:
    """One call of a layer's forward, bound to its signature.

    Args:
        module_class: the dense layer's class.
        args, kwargs: what the model called the layer with.

    Attributes:
        hidden: the hidden states [B, T, D], the layer's first argument.
    """

    def __init__(self, module_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.signature = forward_signature(module_class)
        self.bound = self.signature.bind(*args, **kwargs)
        self.hidden_name = next(iter(self.signature.parameters))
        self.hidden: Tensor = self.bound.arguments[self.hidden_name]
        self.batch, self.time = self.hidden.shape[:2]

    def select(self, rows_R1: Tensor, index_RS: Tensor) -> dict[str, Any]:
        """Keyword overrides for a call on tokens `index_RS` of rows `rows_R1`; the mask and the cache are the
        caller's to add.
        """
        picked = {}
        for name, value in self._items():
            if name not in MASK_NAMES and not isinstance(value, Cache):
                new = self._gather(name, value, rows_R1, index_RS)
                if new is not value:
                    picked[name] = new
        return picked

    def _items(self) -> list[tuple[str, Any]]:
        items = []
        for name, value in self.bound.arguments.items():
            kind = self.signature.parameters[name].kind
            items += list(value.items()) if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]
        return items

    def _gather(self, name: str, value: Any, rows_R1: Tensor, index_RS: Tensor) -> Any:
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(self._gather(name, v, rows_R1, index_RS) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.time:
            if (
                isinstance(value, Tensor)
                and value.dim() == 1
                and value.shape[0] == self.time
                and self.time > 1
            ):
                if index_RS.shape[0] > 1:
                    raise ModlabError(
                        f"layer argument {name!r} is one row for the whole batch: it cannot be packed."
                    )
                return value[index_RS[0].to(value.device)]
            return value
        if value.shape[0] not in (1, self.batch):
            raise ModlabError(
                f"layer argument {name!r} of shape {tuple(value.shape)} has a time axis but no batch axis "
                "of 1 or "
                f"{self.batch}: this architecture cannot be packed yet."
            )
        rows = rows_R1 if value.shape[0] > 1 else torch.zeros_like(rows_R1)
        return value[rows.to(value.device), index_RS.to(value.device)]

    def call(self, forward: Callable[..., Any], changes: dict[str, Any]) -> Any:
        """Calls `forward` with these arguments, `changes` (by name) put in their place."""
        arguments = inspect.BoundArguments(self.signature, dict(self.bound.arguments).copy())  # type: ignore[arg-type]
        for name, value in changes.items():
            parameter = self.signature.parameters.get(name)
            if parameter is not None and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                arguments.arguments[name] = value
            else:
                extra = self._extra_name()
                arguments.arguments[extra] = {**arguments.arguments.get(extra, {}), name: value}
        return forward(*arguments.args, **arguments.kwargs)

    def _extra_name(self) -> str:
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                return name
        raise ModlabError(f"{self.signature} takes no further keyword arguments")

    def mask_name(self) -> str | None:
        """Name under which this layer takes its attention mask, or None."""
        return next((name for name in MASK_NAMES if name in self.signature.parameters), None)

    def cache_name(self) -> str | None:
        """Name under which this call carries a cache, or None."""
        return next((name for name, value in self._items() if isinstance(value, Cache)), None)

    def cache(self) -> Any:
        """The cache that this call carries, or None."""
        return next((value for _, value in self._items() if isinstance(value, Cache)), None)
