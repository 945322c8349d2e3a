"""Bytes of a key/value cache: what it allocates, and what a dense cache would hold for the same tokens.

The one place for this arithmetic; `RaggedCache.nbytes`, `KVTracker`, traces, sweeps and benchmarks read it.
It asks any kind of cache layer, of this package or of transformers, only for what it stores.

Bytes are *allocated* bytes: a narrow view of a larger buffer counts the whole buffer, and a buffer that two
tensors share counts once. That is the number that decides whether a context fits, and it is why a freshly
prefilled sliding-window layer may show more than its window (the cache keeps a slice of the full prompt's
tensor alive).

Shape letters: B rows, K cached keys, G kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

COLUMNS = ("layer", "kind", "device", "seen_tokens", "kept_tokens", "kv_bytes", "dense_kv_bytes")
"""Keys of one row of `snapshot`."""

STEPS = ("key_steps", "value_steps")
"""What a layer that keeps K and V in fewer bits has next to its codes, [..., G, K, 1] (`cache/range.py`)."""


def _buffers(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of at least one dimension that a cache attribute reaches (0-dim tensors are counters)."""
    if isinstance(value, torch.Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if (
            type(value) is not torch.Tensor and inner is not None
        ):  # quantized tensor: its parts hold the memory
            for name in inner()[0]:
                yield from _buffers(getattr(value, name))
        elif value.ndim > 0:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _buffers(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _buffers(item)


def allocated_bytes(*values: Any, counted: set[int] | None = None) -> int:
    """Bytes of the distinct storages behind the tensors in `values`, however nested.

    Storages whose address is already in `counted` are left out; the new ones are added to it.
    """
    counted = set() if counted is None else counted
    total = 0
    for tensor in _buffers(values):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _layer_kind(layer: Any) -> str:
    if _is_ragged(layer):
        return "ragged"
    name = type(layer).__name__
    if hasattr(layer, "_quantized_keys") or "Quantized" in name:
        return "quantized"
    if hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states"):
        return "linear+attention" if isinstance(getattr(layer, "keys", None), torch.Tensor) else "linear"
    if "Dummy" in name:
        return "none"
    static = "static" if "Static" in name else "dynamic"
    return f"{static} sliding" if getattr(layer, "is_sliding", False) else static


def _is_ragged(layer: Any) -> bool:
    """Whether it stores each row at a length of its own (`RaggedLayer`, whose module imports this one)."""
    return hasattr(layer, "lengths")


def _keys_and_values(layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Its keys and values, [B, G, K, H] or flat [G, K, H]; None without any, or before the first."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if hasattr(layer, "_quantized_keys") and (keys is None or keys.ndim < 4):
        # the part in full precision is empty: ask the quantized one what it stands for
        keys, values = layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)
    if keys is None or values is None:
        return None
    return None if keys.ndim < (3 if _is_ragged(layer) else 4) else (keys, values)


def stored_tokens(layer: Any) -> list[int]:
    """Tokens that a cache layer stores for each row; [] before its first use, and for layers without K/V.
    Where KV heads store tokens of their own, as many as they are on the mean of the heads, rounded up."""
    if _is_ragged(layer):
        heads = getattr(layer, "heads", 1)
        by_row = zip(*[iter(layer.lengths)] * heads, strict=True)
        return [-(-sum(lengths) // heads) for lengths in by_row]
    pair = _keys_and_values(layer)
    if pair is None or not pair[0].shape[-2]:
        return []
    stored = pair[0].shape[-2]
    if hasattr(layer, "get_seq_length"):
        seen = int(layer.get_seq_length())
        stored = seen if hasattr(layer, "_quantized_keys") else min(seen, stored)
    return [stored] * pair[0].shape[0]


def token_nbytes(layer: Any) -> int:
    """Bytes that K and V (and an indexer's key, in sparse attention) of one token of one row take in this
    layer as it stores them, codes and steps where it keeps them in fewer bits; 0 before its first key."""
    pair = _keys_and_values(layer)
    if pair is None:
        return 0
    steps = [tensor for name in STEPS if (tensor := getattr(layer, name, None)) is not None]
    return sum(_numbers(layer, tensor) * tensor.element_size() for tensor in (*pair, *steps)) + _index(layer)


def dense_token_nbytes(layer: Any) -> int:
    """The same as a dense cache stores them, in the model's own type."""
    pair = _keys_and_values(layer)
    if pair is None:
        return 0
    if (coded := getattr(layer, "range", None)) is not None:
        heads, key_dim, value_dim = coded.sizes
        dense: int = heads * (key_dim + value_dim) * layer.dtype.itemsize
        return dense + _index(layer)
    return sum(_numbers(layer, tensor) * tensor.element_size() for tensor in pair) + _index(layer)


def _numbers(layer: Any, tensor: torch.Tensor) -> int:
    """How many numbers of a tensor [..., G, K, H] are one token's."""
    apart: int = getattr(layer, "heads", 1)  # heads that the flat buffer has one after another
    return apart * tensor.shape[-3] * tensor.shape[-1]


def _index(layer: Any) -> int:
    index = getattr(layer, "indexer_keys", None)
    return 0 if index is None else index.shape[-1] * index.element_size()


def _device(layer: Any) -> str:
    """Where its keys lie, or what else it holds; "" before the first."""
    return next((str(tensor.device) for tensor in _buffers([getattr(layer, "keys", None), vars(layer)])), "")


def snapshot(cache: Any) -> list[dict[str, Any]]:
    """What a cache holds now: one dict a layer with the keys of `COLUMNS`.

    Args:
        cache: any transformers `Cache`, `RaggedCache` included. Of an encoder-decoder cache the
            self-attention part.

    Returns:
        `layer`, `kind` of cache layer, `device` (where it lies; "" before the first), `seen_tokens`
        (per row, padding included), `kept_tokens` (stored, all rows), `kv_bytes` (allocated),
        `dense_kv_bytes` (a dense cache in the model's own type for the tokens seen, sliding windows limited
        to what the next query can see; a linear-attention layer's own state).
    """
    cache = getattr(cache, "self_attention_cache", cache)
    seen_by_cache = int(cache.get_seq_length())
    stored = [stored_tokens(layer) for layer in cache.layers]
    sizes = [dense_token_nbytes(layer) for layer in cache.layers]
    # A ragged layer that has kept nothing knows no head sizes yet; its neighbours' are the best guess.
    usual = next((size for size in sizes if size), 0)
    counted: set[int] = set()
    rows = []
    for index, (layer, lengths, size) in enumerate(zip(cache.layers, stored, sizes, strict=True)):
        kind = _layer_kind(layer)
        kv_bytes = allocated_bytes(vars(layer), counted=counted)
        seen, dense = seen_by_cache, kv_bytes if kind == "linear" else 0
        if lengths:
            if hasattr(layer, "get_seq_length"):
                seen = int(layer.get_seq_length())
            window = getattr(layer, "sliding_window", None)
            if window is None and getattr(layer, "is_sliding", False):
                window = getattr(layer, "max_cache_len", None)
            # a sliding layer needs window - 1 past tokens for the next query (transformers' DynamicCache)
            dense = len(lengths) * (seen if window is None else min(seen, window - 1)) * (size or usual)
        row = (index, kind, _device(layer), seen, sum(lengths), kv_bytes, dense)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows
