"""The name by which configs choose an attention function of transformers: another one for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def attention_named(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Inside this block modules with one of these configs attend by the function registered under `name`.

    Args:
        configs: each gets back the name that it had. Their sub-configs are left alone: transformers' public
            setter writes to those too, and would give them all the same name back.
        name: as given to `AttentionInterface.register`.
    """
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own
