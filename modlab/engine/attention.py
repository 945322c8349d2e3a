"""The two attention functions that the engine lends to a model: one for prefill, one for decoding.

Registered with transformers under names of their own (`AttentionInterface.register`), so that a family's own
forward calls them; with these names transformers builds no mask, and none is needed: a row's tokens are in
order, and rows do not see each other.

Both store the new keys and values in the engine's ragged cache, which the model itself never touches.

Shape letters: S tokens of all rows in one line, B rows, N query heads, G kv heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from modlab.cache.buffer import SegmentedBuffer
from modlab.engine.ring import RingBuffer
from modlab.engine.tables import LayerStep
from modlab.errors import ModlabError
from modlab.kernels.decode_attention import (
    decode_attention,
    decode_ring_attention,
    reference_decode_attention,
    reference_decode_ring_attention,
)
from modlab.kernels.kept_attention import (
    gather_kept,
    kept_attention,
    reference_kept_attention,
)
from modlab.kernels.varlen_attention import varlen_attention

PREFILL, DECODE = "modlab_prefill", "modlab_decode"
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "alibi")


class CannotCapture(ModlabError):
    """The engine does not cover what this model or this call asks for; the message says what."""


@dataclass
class LayerPrefill:
    """One layer's part in a prefill.

    Attributes:
        buffer: where its keys and values go.
        counts: tokens of each row that run this layer.
        columns: columns of those tokens, one row after another, int32 [S].
        bounds: where in that line each row begins, and the end of the last, int32 [B + 1].
        varying: True if the layer runs other numbers of tokens than its neighbours.
        recent: None, or where routing decides about the cache alone the number of latest tokens that each
            token may attend to, kept or not; then the layer runs all tokens, and `keep`, bool [S], says which
            of them are kept.
    """

    buffer: SegmentedBuffer
    counts: list[int]
    columns: Tensor
    bounds: Tensor
    varying: bool
    recent: int | None = None
    keep: Tensor | None = None


def prefill_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of one line of tokens; q [1, N, S, H], k and v [1, G, S, H].

    Returns:
        output [1, S, N, H], and None where others return weights.
    """
    check_supported(kwargs)
    part: LayerPrefill = module.mod_prefill  # type: ignore[assignment]
    if part.recent is not None:
        return _keep_keys(part, part.recent, query, key, value, scaling), None
    store(part, key[0], value[0])
    return varlen_attention(query, key, value, part.counts, part.bounds, scaling, part.varying), None


def decode_attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row to the layer's cache; q [B, N, 1, H], k and v [B, G, 1, H].

    Returns:
        output [B, 1, N, H], and None where others return weights.
    """
    check_supported(kwargs)
    step: LayerStep = module.mod_step  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new = (query[:, :, 0], key[:, :, 0], value[:, :, 0])
    if step.ring is not None:
        out_BNH = _decode_ring(step, step.ring, new, scale)
    elif query.is_cuda:
        out_BNH = decode_attention(*new, step.table, step.lengths, step.keep, step.column, scale)
    else:
        keys, values, starts = step.stored()
        columns = step.buffer.columns if step.buffer is not None else None
        assert columns is not None
        out_BNH = reference_decode_attention(
            *new, (keys, values, columns), starts, step.lengths, step.keep, step.column, scale
        )
    return out_BNH[:, None], None


def _decode_ring(step: LayerStep, ring: Tensor, new: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """The same where routing decides about the cache alone; `new` are q [B, N, H], k and v [B, G, H]."""
    position_B = step.position[:, 0]
    if new[0].is_cuda:
        return decode_ring_attention(*new, step.table, step.lengths, step.keep, ring, position_B, scale)
    keys, values, starts = step.stored()
    return reference_decode_ring_attention(
        *new, (keys, values), starts, step.lengths, step.keep, ring, position_B, scale
    )


def _keep_keys(
    part: LayerPrefill, recent: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """A prefill in which tokens that are not kept are seen by the next `recent` tokens alone."""
    keep_S, bounds = part.keep, part.bounds
    assert keep_S is not None and isinstance(part.buffer, RingBuffer)
    kept = gather_kept(key, value, keep_S, bounds, recent)
    part.buffer.fill(key[0], value[0], part.counts, keep_S, kept, recent)
    if query.is_cuda:
        return kept_attention(query, key, value, kept, part.counts, bounds, recent, scaling)
    return reference_kept_attention(query, key, value, keep_S, part.counts, recent, scaling)


def check_supported(kwargs: dict[str, Any]) -> None:
    """An error where an attention asks for more than softmax over all earlier tokens."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise CannotCapture(f"its attention uses {name}, which the engine's kernels do not know")


def store(part: LayerPrefill, k_GSH: Tensor, v_GSH: Tensor) -> None:
    """Lays out the layer's buffer with room for decoding, and fills it with each row's tokens."""
    buffer = part.buffer
    buffer.reserve([n + buffer.slack(n) for n in part.counts], k_GSH, v_GSH)
    assert buffer.keys is not None and buffer.values is not None and buffer.columns is not None
    first = 0
    for start, n in zip(buffer.starts, part.counts, strict=True):
        buffer.keys[:, start : start + n] = k_GSH[:, first : first + n]
        buffer.values[:, start : start + n] = v_GSH[:, first : first + n]
        buffer.columns[start : start + n] = part.columns[first : first + n]
        first += n
    buffer.lengths = list(part.counts)


def register() -> None:
    """Makes both functions known to transformers, under new names, when the engine is first enabled."""
    AttentionInterface.register(PREFILL, prefill_attention)
    AttentionInterface.register(DECODE, decode_attention_function)
