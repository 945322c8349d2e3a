"""A bound on what a generation stores where routing decides about the cache (`skip="kv"`, `"kv+prompt"`).

A row (a KV head of it, where heads have gates) that is full gives up the older token of the lowest gate for
each one that leaves its ring (`kernels/ring_budget.py`). A prompt attends to all that is kept, layer after
layer, and is cut down to the bound as each layer is done; texts that stay within it are not touched.

Shape letters: S tokens of all rows in one line, B rows, G kv heads, A gates of a layer, U rows of a layer's
cache (B x A), C capacity of a flat buffer, W tokens of a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.engine.ring import RingBuffer
from modlab.errors import ModlabError, check_count, check_number
from modlab.kernels.kept_attention import Stored

MIB = 2**20
SCORE_BYTES = 4
RING_BYTES = 5
"""Of a token in a ring, next to its key and value: whether it is kept, and its score."""

COLUMN_BYTES = 4
"""Of a token in a layer without a ring."""


@dataclass(frozen=True)
class LayerBytes:
    """What a layer's cache holds of a token: bytes of all KV heads; and its gates A, 0 without a ring."""

    token: int
    gates: int


@dataclass(frozen=True)
class Budget:
    """What a generation may store.

    Attributes:
        tokens: of each row in each routed layer (and KV head, where those have gates), recent ones included;
            None for no bound of that kind.
        mib: of all rows and layers, in MiB; None for none.
        recent: W.
        layers: of the model.

    Raises:
        ModlabError: `tokens` is less than are recent, or `mib` is not above 0.
    """

    tokens: int | None
    mib: float | None
    recent: int
    layers: tuple[LayerBytes, ...]

    def __post_init__(self) -> None:
        if self.tokens is not None and check_count("kv_tokens", self.tokens) < self.recent:
            raise ModlabError(
                f"kv_tokens={self.tokens} is less than the latest {self.recent} tokens (keep_recent), which "
                "are stored whether kept or not: allow more, or have fewer of them "
                "(modlab.set_keep_recent, a larger modlab.set_kv_saving)."
            )
        if self.mib is not None and not check_number("kv_mib", self.mib) > 0:
            raise ModlabError(f"kv_mib={self.mib} has to be above 0.")

    def older(self, batch: int, length: int) -> int:
        """How many tokens a row may store besides its ring, in a generation of so many rows and tokens a row.

        Raises:
            ModlabError: not even the rings, and the layers that are not routed, fit into `mib`.
        """
        most = length if self.tokens is None else self.tokens - self.recent
        if self.mib is None:
            return most
        allowed = int(self.mib * MIB)
        least = self.needed(batch, length, 0)
        if least > allowed:
            take = math.ceil(least / MIB * 1000) / 1000  # upwards: as a bound it would be enough
            raise ModlabError(
                f"kv_mib={self.mib:g} does not hold {batch} row(s) of up to {length} tokens: their latest "
                f"{self.recent} tokens and the layers that are not routed take {take:.3f} MiB. Allow "
                "more, or generate fewer rows at once."
            )
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needed(batch, length, middle) <= allowed else (low, middle - 1)
        return low

    def needed(self, batch: int, length: int, older: int) -> int:
        """Bytes at most: every row full, and one layer held twice while it grows."""
        sizes = [self._layer_bytes(layer, batch, length, older) for layer in self.layers]
        return sum(sizes) + max(sizes)

    def _layer_bytes(self, layer: LayerBytes, batch: int, length: int, older: int) -> int:
        if not layer.gates:
            return batch * (length + SegmentedBuffer.slack(length)) * (layer.token + COLUMN_BYTES)
        places = batch * layer.gates * (self.recent + older)
        rings = batch * layer.gates * self.recent * RING_BYTES
        return places * layer.token // layer.gates + places * SCORE_BYTES + rings


def layer_bytes(buffers: list[SegmentedBuffer]) -> tuple[LayerBytes, ...]:
    """Of each layer, from buffers that hold any tokens of one row."""
    found = []
    for buffer in buffers:
        gates = buffer.heads if isinstance(buffer, RingBuffer) else 0
        contents = (getattr(buffer, name) for name in buffer.contents)
        token = sum(t.shape[0] * t.shape[2] * t.element_size() for t in contents)
        found.append(LayerBytes(token * max(gates, 1), gates))
    return tuple(found)


def score_prompt(buffer: RingBuffer, stored: Stored, score: Tensor, bounds: Tensor) -> None:
    """Writes down the scores of what a prefill has stored.

    Args:
        score: of each token, fp32 [S] or [S, A].
        bounds: where each row begins, and the end of the last, [B + 1].
    """
    gates, recent = len(stored.before_AS), stored.ring_kept_UW.shape[1]
    score_AS = score.view(len(score), -1).t()
    S, device = len(score), score.device
    at_S = torch.arange(S, device=device)
    row_S = torch.searchsorted(bounds[1:], at_S, right=True)
    begin_S, end_S = bounds[:-1][row_S], bounds[1:][row_S]
    is_recent_S = at_S >= end_S - recent
    kept_AS = stored.before_AS.diff(dim=1).bool()
    unit_AS = row_S * gates + torch.arange(gates, device=device)[:, None]
    behind_AS = stored.before_AS[:, :-1] - stored.before_AS.gather(1, begin_S.long().expand(gates, -1))
    place_AS = stored.starts_U[unit_AS] + (end_S - begin_S).clamp_max(recent) + behind_AS
    # What is not stored goes to a place behind the others: an index of what is would ask the host how many.
    buffer.scores = _scattered(score_AS, place_AS, kept_AS & ~is_recent_S, buffer.capacity)
    turned_AS = unit_AS * recent + (at_S - begin_S) % recent
    rings = _scattered(score_AS, turned_AS, is_recent_S.expand(gates, -1), len(stored.starts_U) * recent)
    buffer.ring_scores = rings.view(-1, recent)


def _scattered(value_AS: Tensor, place_AS: Tensor, chosen_AS: Tensor, size: int) -> Tensor:
    out = value_AS.new_zeros(size + 1)
    out[torch.where(chosen_AS, place_AS.long(), size)] = value_AS
    return out[:size]


def cut_down(buffer: RingBuffer, older: int, counts: list[int]) -> None:
    """Leaves each row its ring and the `older` best of its older tokens, in order, with room for no more than
    it may hold; and tells the buffer that this is its bound.

    Args:
        counts: tokens of each row.
    """
    assert buffer.keys is not None and buffer.values is not None and buffer.scores is not None
    recent, device = buffer.ring_kept.shape[1], buffer.keys.device
    buffer.most = recent + older
    if all(n <= c <= buffer.most for n, c in zip(buffer.lengths, buffer.capacities, strict=True)):
        return
    pieces, lengths = [], []
    for unit, (start, n) in enumerate(zip(buffer.starts, buffer.lengths, strict=True)):
        ring = min(counts[unit // buffer.heads], recent)
        places = torch.arange(start, start + n, device=device)
        if n - ring > older:
            best = buffer.scores[start + ring : start + n].sort(descending=True, stable=True).indices[:older]
            places = torch.cat([places[:ring], places[ring:][best.sort().values]])
        pieces.append(places)
        lengths.append(len(places))
    buffer.rebuild(pieces, lengths)
