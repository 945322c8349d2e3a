"""Names that transformers gives to the KV cache, and changes.

The cache is `cache` among a model's arguments since 5.24, `past_key_values` before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from modlab.hf.arguments import forward_signature

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Newest first: where a version knows both, the older one is deprecated."""


def cache_argument(model: Any) -> str:
    """The name that `model`'s forward (a causal LM's or its decoder's) takes its cache under."""
    model_class: Any = type(model)
    names = forward_signature(model_class).parameters
    return next((name for name in CACHE_ARGUMENTS if name in names), CACHE_ARGUMENTS[-1])


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call or the fields of a model's output, or None."""
    return next((arguments[n] for n in CACHE_ARGUMENTS if n in arguments and arguments[n] is not None), None)


def drops_caches(model: Any, gradients: bool) -> bool:
    """Whether the layers of `model` would run without the cache that they are given.

    They do in train mode with gradient checkpointing; in newer versions only where gradients are computed.
    """
    always = "__call__" in vars(GradientCheckpointingLayer)
    if not (gradients or always):
        return False
    return any(
        layer.gradient_checkpointing and layer.training
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    )


def checkpoints_reentrantly(layer: Any) -> bool:
    """Whether this layer's training forwards are checkpointed, and go back with a graph of their own each."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", {})  # transformers binds them by functools.partial
    return bool(getattr(layer, "gradient_checkpointing", False) and keywords.get("use_reentrant"))
