"""Whether an attention does nothing with its keys but attend to them: then it may do so where they lie.

Found out by running it on a few tokens with a cache that returns other keys and values than it was given:
these, and no others, have to come to torch's `scaled_dot_product_attention`, once, without a mask where none
is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicCache

from modlab.hf.arguments import LayerArguments
from modlab.hf.attention_names import attention_named
from modlab.hf.names import CACHE_ARGUMENTS

CACHE_NAMES = (*CACHE_ARGUMENTS, "layer_past", "past_key_value")
"""Under which attentions take their cache, the older ones last."""


def cache_name(arguments: LayerArguments) -> str:
    """The name under which a module takes its cache."""
    names = arguments.signature.parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


class ProbeCache(Cache):
    """A cache that holds nothing and was given nothing before."""

    def __init__(self) -> None:
        super().__init__(layers=DynamicCache().layers or [])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing was seen."""
        return 0


class _Exchanging(ProbeCache):
    """Returns random keys and values [1, G, T, H] in place of those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Others of the same shape."""
        generator = torch.Generator().manual_seed(len(self.returned))
        keys, values = (
            torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
            for x in (key_states, value_states)
        )
        self.returned.append((keys, values))
        return keys, values


class Watching(TorchFunctionMode):
    """Notes the calls of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            self.calls.append(dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)


@torch.no_grad()
def attends_plainly(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `attention`, called so with a few tokens of one row, does; under sdpa, whatever it uses now."""
    arguments = LayerArguments(type(attention), args, kwargs)
    device = arguments.hidden.device
    row, times = (
        torch.zeros(1, 1, dtype=torch.long, device=device),
        torch.arange(arguments.time, device=device),
    )
    config = getattr(attention, "config", None)
    named = attention_named([config], "sdpa") if config is not None else contextlib.nullcontext()
    try:
        with named:
            return all(_plain(attention, arguments, row, at) for at in (times[None], times[None, -1:]))
    except Exception:  # whatever it makes of such a call
        return False


def _plain(attention: nn.Module, arguments: LayerArguments, row_11: Tensor, at_1T: Tensor) -> bool:
    """The same of its tokens `at_1T`."""
    cache, watching, mask_name = _Exchanging(), Watching(), arguments.mask_name()
    if mask_name is None:
        return False
    changes = arguments.select(row_11, at_1T) | {cache_name(arguments): cache, mask_name: None}
    with watching:
        arguments.run(attention, changes)
    if len(cache.returned) != 1 or len(watching.calls) != 1:
        return False
    ((keys, values),), (call,) = cache.returned, watching.calls
    T, masked, dropped = at_1T.shape[1], call.get("attn_mask") is not None, call.get("dropout_p", 0.0)
    causal = T == 1 or bool(call.get("is_causal"))
    shares = all(_repeats(call[name], given) for name, given in (("key", keys), ("value", values)))
    heads = call["query"].shape[1] * call["query"].shape[2] // T
    whole = call["query"].dim() == 4 and heads % keys.shape[1] == 0
    return bool(causal and shares and whole and not masked and not dropped)


def _repeats(got: Tensor, given: Tensor) -> bool:
    """Whether `got` is `given` [1, G, T, H], each head as it is or several times in a row."""
    heads = given.shape[1]
    if got.dim() != 4 or got.shape[1] % heads or got.shape[2:] != given.shape[2:]:
        return False
    return torch.equal(got, given.repeat_interleave(got.shape[1] // heads, 1))
