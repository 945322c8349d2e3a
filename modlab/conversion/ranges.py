"""Keys and values in fewer bits, switched on and off: what they are measured against is found by one forward.

Random tokens do as well as text: on text, attention's inputs hardly move the middle of a channel or its size,
which is all that a range says. Positions matter: rotary embeddings turn keys, in slow channels by little in
512 tokens and by a lot in 5,000. So the tokens are short rows from all over the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from modlab.cache.dtypes import RANGES
from modlab.cache.range import RANGE, KVRange
from modlab.config import KVCacheDtype
from modlab.errors import ModlabError
from modlab.execution.routed import RoutedLayer
from modlab.hf.arguments import forward_signature
from modlab.hf.model import context_length, device_of, eval_mode, vocabulary_size
from modlab.hf.ranks import mesh_of
from modlab.integrations.fsdp import is_sharded
from modlab.routing.forward import asks_for_logits
from modlab.routing.state import dtype_of, routing_of

TOKENS = 512
"""A range is measured over so many."""

ROW = 32
"""Tokens of one row of them, or the model's context, if that is shorter."""

FEW_TOKENS = 8
"""Where only the shapes are wanted: what is measured comes from a file."""


def set_kv_cache_dtype(model: Any, dtype: str) -> None:
    """Sets how routed layers store keys and values (`MoDConfig.kv_cache_dtype`). The next forward uses it; a
    `generate` under way ends as it began. A cache of another dtype is refused; one in fewer bits goes on
    with the ranges that it was filled with.

    ``"int8"`` (eight bits) and ``"k6v4"`` (keys in six bits, values in four) measure each routed layer's
    range of keys and values by one forward over 512 random tokens, drawn from a generator of its own, and add
    it to the layer as a module: it is saved with the routers. Both have the same ranges, so that from one to
    the other, and where it is that already, nothing is measured again: once what computes keys and values has
    changed (the base's weights, adapters on its projections, projections of prompts that leave), set "auto"
    in between. ``"auto"`` takes these modules away, and nothing else is changed. "k6v4" has no fast
    generation yet: `generate` runs without it.

    What is stored is what attention sees, in evaluation and in `generate`, of a token's own keys on. Nothing
    is rounded in train mode without a cache, or with routing off. In eval mode gradients pass keys and values
    as if they were not rounded, but for forwards with a cache, through which none passes them: give
    ``use_cache=False`` where you ask for gradients.

    Args:
        model: a converted model whose cache routing decides about (``skip="kv"``, ``"kv+prompt"``).
        dtype: "auto", "int8" or "k6v4".

    Raises:
        ModlabError: the model is dense, another skip or dtype, weights that are shared across ranks (tensor
            parallelism, FSDP2), keys and values that are no such numbers, or heads whose numbers cannot be
            packed so. Nothing is changed then.
    """
    routing = routing_of(model)
    if dtype not in get_args(KVCacheDtype):
        raise ModlabError(f"kv_cache_dtype={dtype!r}: choose one of {', '.join(get_args(KVCacheDtype))}.")
    chosen: Any = dtype
    dataclasses.replace(routing.config, kv_cache_dtype=chosen)  # which the skip may refuse
    if dtype == "auto":
        for layer in _routed_layers(model):
            if RANGE in layer._modules:
                delattr(layer, RANGE)
                layer.mod_plan.added.remove(RANGE)
        routing.set_ranges({})
    elif not routing.common_ranges:
        begin_rounding(model, dtype)
    elif dtype != dtype_of(routing.common_ranges):
        kind = RANGES[dtype]
        _set(model, {index: kind.measured_by(one) for index, one in routing.common_ranges.items()})


def check_rounding(model: Any, dtype: str) -> None:
    """Refuses a model that cannot store keys and values in fewer bits, whatever is routed.

    Raises:
        ModlabError: its weights are shared across ranks.
    """
    if is_sharded(model):
        raise ModlabError(
            f"kv_cache_dtype={dtype!r}: FSDP2 has sharded this model already. Set it before (MoDConfig, or "
            "modlab.set_kv_cache_dtype), then shard."
        )
    if mesh_of(model) is not None:
        raise ModlabError(
            f"kv_cache_dtype={dtype!r}: the heads of this model are shared across ranks (tensor "
            "parallelism), each of which would measure its own. Leave kv_cache_dtype out there ('auto')."
        )


def begin_rounding(model: Any, dtype: str, tokens: int = TOKENS) -> None:
    """Measures ranges over so many tokens, and stores keys and values by them from here on.

    Raises:
        ModlabError: as of `set_kv_cache_dtype`.
    """
    check_rounding(model, dtype)
    _set(model, _measured(model, dtype, tokens))


def _set(model: Any, ranges: Mapping[int, KVRange]) -> None:
    for layer in _routed_layers(model):
        found = ranges[layer.mod_plan.layer_idx].train(layer.training)
        if RANGE not in layer._modules:
            layer.mod_plan.added.append(RANGE)
        layer.add_module(RANGE, found)
    routing_of(model).set_ranges(ranges)


class _Listening:
    """Stands for a layer's range while it is measured: nothing is rounded."""

    def __init__(self, kind: type[KVRange]) -> None:
        self.kind = kind
        self.range: KVRange | None = None

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes over the range of keys and values [B, G, S, H]."""
        G, HK, HV = keys.shape[1], keys.shape[-1], values.shape[-1]
        self.range = self.kind(G, HK, HV, keys.device)
        self.range.measure(keys, values)
        return keys, values


@torch.no_grad()
def _measured(model: Any, dtype: str, tokens: int) -> Mapping[int, KVRange]:
    """Ranges by routed layer, of a forward in which everything is kept."""
    routing = routing_of(model)
    # Of an unknown context a table of positions may end anywhere: rows begin at its beginning then.
    length = min(ROW, tokens, context_length(model) or ROW)
    context = context_length(model) or length
    shape = (-(-tokens // length), length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(model) or 1, shape, generator=generator).to(device_of(model))
    some: dict[str, Any] = {"logits_to_keep": 1} if asks_for_logits(model) else {}
    model_class: Any = type(model)
    if "position_ids" in forward_signature(model_class).parameters:
        starts = torch.randint(context - length + 1, (shape[0], 1), generator=generator)
        some["position_ids"] = (starts + torch.arange(length)).to(ids.device)
    listening = {index: _Listening(RANGES[dtype]) for index in routing.layers}
    with eval_mode(model), routing.apart(listening, lambda index, gate, at: torch.ones_like(gate).bool()):
        model(input_ids=ids, use_cache=False, **some)
    ranges = {index: one.range for index, one in listening.items() if one.range is not None}
    if deaf := sorted(listening.keys() - ranges.keys()):
        raise ModlabError(
            f"kv_cache_dtype={dtype!r}: the attention of layer {deaf[0]} does not attend to what its cache "
            "gives back, so that there is nothing to round. Leave kv_cache_dtype out ('auto')."
        )
    for index, found in ranges.items():
        if not all(bool(torch.isfinite(buffer).all()) for buffer in found.buffers()):
            raise ModlabError(
                f"kv_cache_dtype={dtype!r}: keys or values of layer {index} are NaN or infinite."
            )
    return ranges


def _routed_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in list(model.modules()) if isinstance(module, RoutedLayer))
