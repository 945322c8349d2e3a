"""The two attention functions that the engine lends to a model: one for prefill, one for decoding.

Registered with transformers under names of their own (`AttentionInterface.register`), so that a family's own
forward calls them; with these names transformers builds no mask, and none is needed: a row's tokens are in
order, and rows do not see each other.

Both store the new keys and values in the engine's ragged cache, which the model itself never touches.

Shape letters: S tokens of all rows in one line, B rows, N query heads, G kv heads, H head dim, A gates of a
layer (1, or G).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from modlab.cache.buffer import SegmentedBuffer
from modlab.cache.int8 import Int8Range
from modlab.engine.budget import cut_down, score_prompt
from modlab.engine.compiled_layers import compiles_a_layer, line_attention
from modlab.engine.deferred import DeferredLayouts, keep_everything
from modlab.engine.ring import Int8Ring, RingBuffer
from modlab.engine.tables import LayerStep
from modlab.engine.transfer import Fetched, sent
from modlab.errors import ModlabError
from modlab.kernels.aside import rejoin
from modlab.kernels.decode_attention import (
    decode_attention,
    decode_ring_attention,
    fold,
    reference_decode_attention,
    reference_decode_ring_attention,
)
from modlab.kernels.int8 import Encoded, encode, reference_encode
from modlab.kernels.kept_attention import (
    Stored,
    block_size,
    kept_attention,
    kept_before,
    older_kept,
    older_spans,
    query_blocks,
    reference_kept_attention,
    reference_store_kept,
    store_kept,
)
from modlab.kernels.ring_budget import RingBudget, make_room, reference_make_room
from modlab.kernels.varlen_attention import varlen_attention

PREFILL, DECODE = "modlab_prefill", "modlab_decode"
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "alibi")


class CannotCapture(ModlabError):
    """The engine does not cover what this model or this call asks for; the message says what."""


class LineBlocks:
    """What kernels are told of a line in numbers, sent once for all of its layers: the blocks of queries in
    which they run it, and which heads keep everything.

    Args:
        counts: tokens of each row.
        device: of the model.
    """

    def __init__(self, counts: list[int], device: torch.device) -> None:
        self.counts, self.device = counts, device
        self._known: dict[Any, Tensor] = {}

    def of(self, size: int) -> Tensor:
        """int32 [Q, 4], see `query_blocks`."""
        return self._once(("blocks", size), lambda: query_blocks(self.counts, size))

    def older(self, recent: int) -> Tensor:
        """Where the tokens are that are not recent, see `older_spans`."""
        return self._once(("older", recent), lambda: older_spans(self.counts, recent))

    def heads(self, whole_G: list[bool], group: int) -> tuple[Tensor, Tensor, Tensor]:
        """KV heads that do not keep everything, those that do, and the query heads of these, long.

        Args:
            whole_G: which KV heads keep everything.
            group: query heads of a KV head.
        """
        some = [head for head, whole in enumerate(whole_G) if not whole]
        whole = [head for head, whole in enumerate(whole_G) if whole]
        queries = [head * group + i for head in whole for i in range(group)]
        numbers = self._once(("heads", *whole_G, group), lambda: torch.tensor([*some, *whole, *queries]))
        first, second, third = numbers.split([len(some), len(whole), len(queries)])
        return first, second, third

    def sent(self, numbers: list[int]) -> Tensor:
        """These numbers, long, once for all layers that ask for the same: where segments begin is the same in
        all of them if there is one a layer. Not to be written to."""
        return self._once(("numbers", *numbers), lambda: torch.tensor(numbers))

    def _once(self, key: Any, numbers: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = sent(numbers(), self.device)
        return self._known[key]


class KeptKeys:
    """Whose keys and values one layer of a prefill keeps.

    Args:
        keep: of each token, bool [S] or [S, A].
        bounds: where each row begins, and the end of the last, int32 [B + 1].
        recent: W, latest tokens that each token sees, kept or not.
        blocks: of the line.
        most_older: tokens that a row may store besides its ring; None for no bound.
        score: of each token, fp32 [S] or [S, A], where there is a bound.

    Attributes:
        before: kept tokens before each place, int32 [A, S + 1].
        older: how many each unit keeps that are not recent. The host has to know, to allocate: it asks when
            the layer begins, and reads when its attention does and the GPU has the projections to run, or a
            layer later (`deferred.py`).
    """

    def __init__(
        self,
        keep: Tensor,
        bounds: Tensor,
        recent: int,
        blocks: LineBlocks,
        most_older: int | None = None,
        score: Tensor | None = None,
    ) -> None:
        self.keep, self.recent, self.bounds, self.blocks = keep, recent, bounds, blocks
        self.most_older, self.score = most_older, score
        self.before = kept_before(keep)
        self.older = Fetched(older_kept(self.before, blocks.older(recent)))


@dataclass
class LayerPrefill:
    """One layer's part in a prefill.

    Attributes:
        buffer: where its keys and values go.
        counts: tokens of each row that run this layer.
        columns: columns of those tokens, one row after another, int32 [S].
        bounds: where in that line each row begins, and the end of the last, int32 [B + 1].
        varying: True if the layer runs other numbers of tokens than its neighbours.
        kept: where routing decides about the cache alone, whose keys and values stay; then the layer runs all
            tokens.
        deferred: where the layer is given exact room later; None: at once.
        attend: what attends instead, where tokens leave (`leaving`): given query, key, value and scaling.
        int8: what keys and values are measured against, where they are stored in eight bits.
    """

    buffer: SegmentedBuffer
    counts: list[int]
    columns: Tensor
    bounds: Tensor
    varying: bool
    kept: KeptKeys | None = None
    deferred: DeferredLayouts | None = None
    attend: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None = None
    int8: Int8Range | None = None


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
    if torch.compiler.is_compiling() and compiles_a_layer():
        return line_attention(query, key, value, scaling), None
    part: LayerPrefill = module.mod_prefill  # type: ignore[assignment]
    return attend_line(part, query, key, value, scaling), None


def attend_line(
    part: LayerPrefill, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """The same, told which layer it is; its keys and values are stored."""
    rejoin(query.device)  # who is kept may have been decided meanwhile
    if part.attend is not None:
        return part.attend(query, key, value, scaling)
    if part.kept is not None:
        return _keep_keys(part, part.kept, query, key, value, scaling)
    store(part, key[0], value[0])
    return varlen_attention(query, key, value, part.counts, part.bounds, scaling, part.varying)


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
    return attend_step(step, (query[:, :, 0], key[:, :, 0], value[:, :, 0]), scale)[:, None], None


def attend_step(step: LayerStep, new: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """Stores one new token a row and attends to all that the row stores; `new` are q [B, N, H], k and v
    [B, G, H]; output [B, N, H]."""
    if step.ring is not None:
        return _decode_ring(step, step.ring, new, scale)
    if new[0].is_cuda:
        return decode_attention(*new, step.table, step.lengths, step.keep, step.column, scale)
    (keys, values), starts = step.stored()
    columns = step.buffer.columns if step.buffer is not None else None
    assert columns is not None
    return reference_decode_attention(
        *new, (keys, values, columns), starts, step.lengths, step.keep, step.column, scale
    )


def _decode_ring(step: LayerStep, ring: Tensor, new: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """The same where routing decides about the cache alone; `new` are q [B, N, H], k and v [B, G, H]. A KV
    head with a gate of its own is a row of the cache."""
    position_B, shape, rows = step.position[:, 0], new[0].shape, step.lengths.shape[0]
    q, k, v = (fold(t, rows) for t in new)
    state, place = (step.lengths, step.keep, ring, position_B, scale), None
    if step.budget is not None:
        _make_room(step, step.budget, ring, position_B)
        place = step.budget.place_U
    if q.is_cuda:
        int8 = step.int8
        channels = () if int8 is None else (int8.key_shift, int8.key_step, int8.value_step)
        out = decode_ring_attention(q, k, v, step.table, *state, place, *channels)
    else:
        buffers, starts = step.stored()
        out = reference_decode_ring_attention(q, k, v, buffers, starts, *state, place, step.int8)
    return out.view(*shape[:2], -1)


def _make_room(step: LayerStep, budget: RingBudget, ring: Tensor, position_B: Tensor) -> None:
    """Says where the tokens that leave their rings go, in rows that may hold no more than so many."""
    assert step.gate is not None
    if step.gate.is_cuda:
        make_room(
            step.table, step.lengths, ring, step.gate, position_B, budget.scores_UW, budget.place_U,
            budget.most_1, budget.keep_first,
        )  # fmt: skip
        return
    buffer = step.buffer
    assert isinstance(buffer, RingBuffer) and buffer.scores is not None
    reference_make_room(budget, buffer.scores, buffer.starts, step.lengths, ring, step.gate, position_B)


def _keep_keys(
    part: LayerPrefill, kept: KeptKeys, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> Tensor:
    """A prefill in which tokens that are not kept are seen by the next `recent` tokens alone."""
    encoded = encoded_line(part, key, value)
    stored, whole_A = _store_deferred(part, kept, query, key, value, encoded) or _store_at_once(
        part, kept, query, key, value, encoded
    )
    if encoded is not None:
        key, value = encoded.seen
    del encoded  # the codes of the whole line
    if query.is_cuda:
        seen = stored if part.int8 is None or all(whole_A) else _seen(kept, stored, query, key, value)
        out = attend_by_head(part, kept.blocks, seen, whole_A, query, key, value, scaling)
    elif all(whole_A):
        out = varlen_attention(query, key, value, part.counts, part.bounds, scaling, part.varying)
    else:
        out = reference_kept_attention(query, key, value, kept.keep, part.counts, kept.recent, scaling)
    hold_to_bound(part, kept, stored)
    return out


def encoded_line(part: LayerPrefill, key: Tensor, value: Tensor) -> Encoded | None:
    """Keys and values of the line in eight bits, [1, G, S, H]; None where they are stored as they are."""
    if part.int8 is None:
        return None
    return (encode if key.is_cuda else reference_encode)(part.int8, key, value)


def _seen(kept: KeptKeys, stored: Stored, query: Tensor, key: Tensor, value: Tensor) -> Stored:
    """What is stored in eight bits as attention sees it, for as long as this one layer attends."""
    seen = replace(stored, keys=_like(stored.keys, key), values=_like(stored.values, value))
    _fill(kept, query, key, value, seen)
    return seen


def _like(codes: Tensor, seen: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=seen.dtype)


def _store_deferred(
    part: LayerPrefill,
    kept: KeptKeys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoded: Encoded | None,
) -> tuple[Stored, list[bool]] | None:
    """Fills a buffer in which all tokens have room until the next layer asks how many are kept.

    Returns:
        that, and which gates keep everything, as far as is known: where all tokens are recent. None for a
        layer that is given exact room at once.
    """
    deferred, gates = part.deferred, len(kept.before)
    if deferred is None or kept.most_older is not None:
        return None
    deferred.settle()
    most = [max(n - kept.recent, 0) for n in part.counts for _ in range(gates)]
    if any(most) and deferred.next_one_waits:
        return None
    stored = store_kept_keys(part, kept, most, query, key, value, encoded)
    assert isinstance(part.buffer, RingBuffer)
    deferred.add(part.buffer, kept.older)
    return stored, [not any(most)] * gates


def _store_at_once(
    part: LayerPrefill,
    kept: KeptKeys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoded: Encoded | None,
) -> tuple[Stored, list[bool]]:
    """The same with exact room; the host waits for how much."""
    older = kept.older.read()
    whole_A = keep_everything(part.counts, older, kept.recent)
    if part.deferred is not None:
        part.deferred.learn(whole_A)
    return store_kept_keys(part, kept, older, query, key, value, encoded), whole_A


def store_kept_keys(
    part: LayerPrefill,
    kept: KeptKeys,
    older: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    encoded: Encoded | None,
) -> Stored:
    """Lays out the layer's buffer and fills it with what is kept or recent.

    Args:
        older: kept tokens of each unit that are not recent, or more: so many have room.
        encoded: of the same keys and values, where the layer stores them in eight bits.
    """
    assert isinstance(part.buffer, RingBuffer)
    stored = part.buffer.lay_out(
        part.counts, older, kept.before, kept.recent, key[0], value[0], kept.blocks.sent
    )
    if encoded is None:
        _fill(kept, query, key, value, stored)
    else:
        assert isinstance(part.buffer, Int8Ring)
        key_steps, value_steps = part.buffer.key_steps, part.buffer.value_steps
        assert key_steps is not None and value_steps is not None
        _fill(kept, query, *encoded.codes, stored)
        _fill(kept, query, *encoded.steps, replace(stored, keys=key_steps, values=value_steps))
    return stored


def _fill(kept: KeptKeys, query: Tensor, key: Tensor, value: Tensor, stored: Stored) -> None:
    """Copies what is kept or recent of contents [1, G, S, H] of the line to its place."""
    if query.is_cuda:
        size = block_size(query, value)
        store_kept(key, value, kept.blocks.of(size), size, stored)
    else:
        reference_store_kept(key, value, kept.blocks.counts, stored)


def hold_to_bound(part: LayerPrefill, kept: KeptKeys, stored: Stored) -> None:
    """Gives up what a row stores beyond its bound, if it has one: all that attend have done so."""
    if kept.most_older is not None and kept.score is not None:
        assert isinstance(part.buffer, RingBuffer)
        score_prompt(part.buffer, stored, kept.score, kept.bounds)
        cut_down(part.buffer, kept.most_older, part.counts)


def attend_by_head(
    part: LayerPrefill,
    blocks: LineBlocks,
    stored: Stored,
    whole_A: list[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
) -> Tensor:
    """Heads that keep everything by the dense kernels, which are faster where they have the same work to do,
    the others by the kernel that passes over what is not kept.

    Args:
        whole_A: which gates keep everything.
    """
    if all(whole_A):
        return varlen_attention(query, key, value, part.counts, part.bounds, scaling, part.varying)
    (N, S), G = query.shape[1:3], key.shape[1]
    some, whole, queries = blocks.heads([whole_A[head % len(whole_A)] for head in range(G)], N // G)
    size = block_size(query, value)
    out = query.new_empty(1, S, N, value.shape[3])
    kept_attention(query, key, value, stored, blocks.of(size), size, scaling, some, out)
    if len(whole):
        q, k, v = query[:, queries], key[:, whole], value[:, whole]
        dense = varlen_attention(q, k, v, part.counts, part.bounds, scaling, part.varying)
        out.index_copy_(2, queries, dense)
    return out


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
