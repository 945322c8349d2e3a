"""How routed layers store keys and values: the one place that knows it by `MoDConfig.kv_cache_dtype`."""

from __future__ import annotations

from collections.abc import Mapping

from modlab.cache.int8 import Int8Range
from modlab.cache.k6v4 import K6V4Range
from modlab.cache.range import KVRange

RANGES: Mapping[str, type[KVRange]] = {kind.kv_cache_dtype: kind for kind in (Int8Range, K6V4Range)}
"""What codes keys and values, by dtype; "auto", the model's own type, has nothing that does."""


def token_bytes(kv_cache_dtype: str, heads: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes of one token's keys and values in one layer, steps included.

    Args:
        itemsize: bytes of a number in the model's own type.

    Raises:
        ModlabError: such heads cannot be stored so.
    """
    if kv_cache_dtype in RANGES:
        return RANGES[kv_cache_dtype].token_bytes(heads, key_dim, value_dim)
    return heads * (key_dim + value_dim) * itemsize
