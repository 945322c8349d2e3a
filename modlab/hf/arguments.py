"""The arguments of one call of a decoder layer, and how to cut them down to some of its tokens.

Every architecture passes its layers other things (rotary tables, positions, caches, masks), by position or by
name. One rule covers them: what has a time axis is gathered along it, biases of attention scores are gathered
along their key axis too, the mask and the cache are replaced, everything else passes through.

Shape letters: B batch rows, R rows of one group, T tokens in, S kept tokens, C columns of the padded batch
seen so far, K keys, N query heads, P parallel streams, D model dim.
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

BIASES = {"alibi": True, "position_bias": False}
"""Arguments that are added to attention scores, so as long as the keys, and whether their first axis holds
the rows of the batch ([B·N, 1, C] or [B, N, 1, C], BLOOM and Falcon) or only the heads ([N, 1, C or longer],
MPT)."""


@functools.cache
def forward_signature(module_class: Any) -> inspect.Signature:
    """Signature of `module_class.forward` without self."""
    signature = inspect.signature(module_class.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def hidden_name(module_class: Any) -> str:
    """Name under which a module takes its hidden states: its forward's first argument."""
    return next(iter(forward_signature(module_class).parameters))


class LayerArguments:
    """One call of a layer's forward, bound to its signature.

    Args:
        module_class: the dense layer's class.
        args, kwargs: what the model called the layer with.
        batch_time: (B, T) of the forward, by which parallel residual streams are told from rows; without it
            the hidden states are taken as [B, T, ...].

    Attributes:
        in_tuple: whether the module returned its output in a tuple, be it of one; None before `run`.
        hidden: the hidden states, the layer's first argument: [B, T, D], or [B, T, P, D] where the model has
            P parallel residual streams (Gemma 3n keeps them in front, as [P, B, T, D]).
    """

    def __init__(
        self,
        module_class: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_time: tuple[int, int] | None = None,
    ) -> None:
        self.signature = forward_signature(module_class)
        self.bound = self.signature.bind(*args, **kwargs)
        self.hidden_name = hidden_name(module_class)
        self.hidden: Tensor = self.bound.arguments[self.hidden_name]
        shape = self.hidden.shape
        self.streams_first = len(shape) == 4 and shape[1:3] == batch_time and shape[:2] != batch_time
        if self.streams_first:
            self.hidden = self.hidden.movedim(0, 2)
        self.batch, self.time = self.hidden.shape[:2]
        self.in_tuple: bool | None = None

    @property
    def residual_BTD(self) -> Tensor:
        """What the router reads: the hidden states, the mean of them where there are parallel streams."""
        return self.hidden if self.hidden.dim() == 3 else self.hidden.mean(dim=2)

    def select(
        self, rows_R1: Tensor, index_RS: Tensor, keys_RK: Tensor | None = None, columns: int | None = None
    ) -> dict[str, Any]:
        """Keyword overrides for a call on tokens `index_RS` of rows `rows_R1`; the mask and the cache are the
        caller's to add.

        Args:
            rows_R1: batch rows.
            index_RS: time positions of the tokens.
            keys_RK: columns of the keys they attend to; None where those are the tokens themselves.
            columns: how many columns have been seen, these tokens' included; T by default.
        """
        picked = {}
        for name, value in self._items():
            if name in MASK_NAMES or isinstance(value, Cache):
                continue
            if name == self.hidden_name:
                value = self.hidden
            if name in BIASES and isinstance(value, Tensor):
                at_RK = index_RS if keys_RK is None else keys_RK
                new = _gather_bias(value, BIASES[name], self.batch, rows_R1, at_RK, columns or self.time)
            else:
                new = self._gather(name, value, rows_R1, index_RS)
            if new is not value:
                picked[name] = new
        return picked

    @property
    def one_row_each(self) -> bool:
        """Whether some argument has a time or key axis but no batch axis: rows must run one by one then."""
        if self.batch == 1:
            return False
        return any(
            isinstance(value, Tensor)
            and (
                BIASES[name] is False
                if name in BIASES
                else value.dim() == 1 and value.shape[0] == self.time > 1
            )
            for name, value in self._items()
        )

    def _items(self) -> list[tuple[str, Any]]:
        items = []
        for name, value in self.bound.arguments.items():
            kind = self.signature.parameters[name].kind
            items += list(value.items()) if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]
        return items

    def _gather(self, name: str, value: Any, rows_R1: Tensor, index_RS: Tensor) -> Any:
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(self._gather(name, v, rows_R1, index_RS) for v in value)
        if not isinstance(value, Tensor):
            return value
        rows_R1, index_RS = rows_R1.to(value.device), index_RS.to(value.device)
        if value.dim() == 1 and value.shape[0] == self.batch and "position" not in name:
            return value[rows_R1[:, 0]]  # something about each row, like XMOD's languages
        if value.dim() == 1 and value.shape[0] == self.time > 1:
            return value[index_RS[0]]  # the caller runs rows one by one, see one_row_each
        batched = value.dim() >= 2 and value.shape[0] in (1, self.batch)
        # a single index, which a GPU would gather row by row
        one_row = value.dim() > 0 and value.shape[0] == len(index_RS) == 1
        if batched and value.shape[1] == self.time:
            if value.requires_grad and value.shape[0] == self.batch:
                return take_tokens(value, rows_R1, index_RS)
            if one_row:
                return value[:, index_RS[0]]
            return value[rows_R1 if value.shape[0] > 1 else torch.zeros_like(rows_R1), index_RS]
        if batched and value.dim() == 4 and value.shape[1] == 1 and value.shape[2] == self.time:
            # a rotary table or scale with an axis for the heads: [B or 1, 1, T, ...]
            if one_row:
                return value[:, :, index_RS[0]]
            rows_R1 = rows_R1 if value.shape[0] > 1 else torch.zeros_like(rows_R1)
            return value[rows_R1, 0, index_RS][:, None]
        if value.dim() >= 2 and value.shape[1] == self.time and (self.time > 1 or self.batch > 1):
            raise ModlabError(
                f"layer argument {name!r} of shape {tuple(value.shape)} has a time axis but no batch axis "
                f"of 1 or {self.batch}: this architecture cannot be packed yet."
            )
        return value

    def call(self, forward: Callable[..., Any], changes: dict[str, Any]) -> Any:
        """Calls `forward` with these arguments, `changes` (by name) put in their place."""
        arguments = inspect.BoundArguments(self.signature, dict(self.bound.arguments).copy())  # type: ignore[arg-type]
        for name, value in changes.items():
            parameter = self.signature.parameters.get(name)
            if parameter is not None and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                given = self.as_given(value) if name == self.hidden_name else value
                arguments.arguments[name] = given
            else:
                extra = self._extra_name()
                arguments.arguments[extra] = {**arguments.arguments.get(extra, {}), name: value}
        return forward(*arguments.args, **arguments.kwargs)

    def run(self, forward: Callable[..., Any], changes: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """As `call`; returns the hidden states, laid out as `hidden` is, and the rest of the output (() if it
        was one tensor)."""
        output = self.call(forward, changes)
        self.in_tuple = isinstance(output, (tuple, list))
        y, rest = (output[0], tuple(output[1:])) if self.in_tuple else (output, ())
        given = changes.get(self.hidden_name, self.hidden)
        if y.dim() == 2 and given.dim() == 3:  # Llama 4's experts return their tokens in one row
            y = y.view(given.shape)
        return (y.movedim(0, 2) if self.streams_first else y), rest

    def as_given(self, hidden: Tensor) -> Tensor:
        """Hidden states in the layer's own layout."""
        return hidden.movedim(2, 0) if self.streams_first else hidden

    def _extra_name(self) -> str:
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                return name
        raise ModlabError(f"{self.signature} takes no further keyword arguments")

    def mask_name(self) -> str | None:
        """Name under which this layer takes its attention mask, or None."""
        return next((name for name in MASK_NAMES if name in self.signature.parameters), None)

    def mask(self) -> Any:
        """The attention mask that the model made for this layer: a tensor, None, or what a kernel takes."""
        name = self.mask_name()
        return None if name is None else self.bound.arguments.get(name)

    def cache_name(self) -> str | None:
        """Name under which this call carries a cache, or None."""
        return next((name for name, value in self._items() if isinstance(value, Cache)), None)

    def cache(self) -> Any:
        """The cache that this call carries, or None."""
        return next((value for _, value in self._items() if isinstance(value, Cache)), None)


def take_tokens(value_BT: Tensor, rows_R1: Tensor, index_RS: Tensor) -> Tensor:
    """`value_BT[rows_R1, index_RS]`, by one index into all tokens.

    The gradient of two indices is gathered by sorting them, that of one is added where it belongs.
    """
    flat_RS = rows_R1 * value_BT.shape[1] + index_RS
    picked = value_BT.flatten(0, 1).index_select(0, flat_RS.flatten())
    return picked.unflatten(0, flat_RS.shape)


def _gather_bias(
    bias: Tensor, with_rows: bool, batch: int, rows_R1: Tensor, keys_RK: Tensor, columns: int
) -> Tensor:
    """A bias of attention scores, laid out as `BIASES` says, at the columns of these rows' keys.

    It ends at the newest column; a longer one starts before the first. Key slots without a token get some
    other key's bias: the mask hides them.
    """
    at_RK = keys_RK.long().clamp(max=columns - 1).to(bias.device) + (bias.shape[-1] - columns)
    if not with_rows:
        return bias[..., at_RK[0]]
    flat = bias.dim() == 3
    bias_BN1C = bias.view(batch, -1, *bias.shape[1:]) if flat else bias
    picked_RN1C = bias_BN1C[rows_R1[:, 0].to(bias.device)]
    at = at_RK[:, None, None, :].expand(*picked_RN1C.shape[:-1], -1)
    picked_RN1K = picked_RN1C.gather(-1, at)
    return picked_RN1K.flatten(0, 1) if flat else picked_RN1K
