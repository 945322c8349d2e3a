"""The name under which transformers passes a KV cache: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
