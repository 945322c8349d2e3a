"""The cache layer of skip="kv" with a gate a KV head: each head of each row holds tokens of its own.

Shape letters: R rows of one group, S new tokens, K keys of a row, G kv heads, H head dim, C capacity of the
flat buffer in keys, P columns seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modlab.cache.layer import NO_KEY
from modlab.cache.range import KVRange
from modlab.cache.recent import RecentLayer


@dataclass
class Joined:
    """The keys of some rows as one attention sees them: every column that any head of the row holds.

    Attributes:
        columns_RK: of the keys; `NO_KEY` beyond a row's last.
        places_RGK: where each head has them in the flat buffer; of one that it does not hold, some other.
        held_RGK: whether it holds them.
        counts: keys of each row.
    """

    columns_RK: Tensor
    places_RGK: Tensor
    held_RGK: Tensor
    counts: list[int]


class HeadsLayer(RecentLayer):
    """A `RecentLayer` whose segments are the KV heads of each row, one after another, so that what is
    allocated is what they keep, however unequal they are.

        keys, values [1, C, H]   | row 0: head 0 ... | head 1 . | ... | row 1: head 0 .. | ...

    Segment `row * G + g` is head g of a row: `starts`, `lengths` and `capacities` have B * G entries. An
    attention is given all keys that any head of the row holds, as a temporary of this one layer (`write`),
    and the mask hides from each head what it does not hold (`key_kept`).

    Args:
        heads: G, at least 2.
        keep_recent: how many of the latest tokens a token may attend to, kept or not; itself counted.
        sliding_window: attention span of the layer in tokens, or None.
        range: as of a `RecentLayer`.
    """

    def __init__(
        self, heads: int, keep_recent: int, sliding_window: int | None = None, range: KVRange | None = None
    ) -> None:
        self.heads = heads
        super().__init__(keep_recent, sliding_window, range)

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        super().clear()
        self._joined: Joined | None = None

    def segments(self, row: int) -> list[int]:
        """The segments that hold a row: one for each head."""
        return list(range(row * self.heads, (row + 1) * self.heads))

    def heads_of(self, segment: int) -> slice:
        """The one KV head that a segment holds keys of."""
        head = segment % self.heads
        return slice(head, head + 1)

    def _of(self, rows: list[int]) -> list[int]:
        """The segments of several rows."""
        return [segment for row in rows for segment in self.segments(row)]

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Room for one head in each place."""
        super().allocate(keys[..., :1, :, :], values[..., :1, :, :])

    # One forward

    def begin(self, counts: list[int], num_columns: int, device: torch.device) -> None:
        """Makes room for `counts[b]` new tokens in every head of row b."""
        super().begin([count for count in counts for _ in range(self.heads)], num_columns, device)

    def claim(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> None:
        """As in a `RecentLayer`; `kept_RS` may say it by head, [R, S, G]."""
        if kept_RS is not None:
            by_head = kept_RS if kept_RS.dim() == 3 else kept_RS[..., None].expand(*kept_RS.shape, self.heads)
            kept_RS = by_head.transpose(1, 2).flatten(0, 1)
        super().claim(self._of(rows), columns_RS.repeat_interleave(self.heads, 0), kept_RS)

    def stage(self, rows: list[int], columns_RS: Tensor, kept_RS: Tensor | None = None) -> Tensor:
        """`claim`, for a `write`.

        Returns:
            columns of all keys that any head of a row holds, [R, K]; `NO_KEY` beyond a row's last.
        """
        self.claim(rows, columns_RS, kept_RS)
        self._joined = self._join(rows)
        return self._joined.columns_RK

    def store(self, rows: list[int], keys: Tensor, values: Tensor) -> None:
        """Stores K/V [R, G, S, H] of the tokens just claimed."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        S, segments = keys.shape[2], self._of(rows)
        contents = self.encoded(keys, values)
        if keys.is_cuda:  # in one launch
            places_QS = self.last_places(segments, S)
            for name, new in contents.items():
                getattr(self, name)[0, places_QS] = new.flatten(0, 1)
            return
        for name, new in contents.items():
            content = getattr(self, name)
            for segment, of_head in zip(segments, new.flatten(0, 1), strict=True):
                end = self.starts[segment] + self.lengths[segment]
                content[0, end - S : end] = of_head

    def write(self, rows: list[int], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`store`; returns K/V [R, G, K, H] of the columns that `stage` returned. A head that does not hold
        one has another of its keys there (finite, masked)."""
        self.store(rows, keys, values)
        assert self._joined is not None
        places_RGK = self._joined.places_RGK
        return self.decoded(lambda content: content[0][places_RGK])

    def held(self, rows: list[int]) -> list[int]:
        """As of `stage`, which was for the same rows."""
        assert self._joined is not None
        return self._joined.counts

    def key_kept(self, rows: list[int]) -> Tensor:
        """Whether the keys that `stage` returned are kept ones, by head: bool [R, K, G]. What a head does not
        hold it does not keep."""
        assert self.kept is not None and self._joined is not None
        return (self.kept[self._joined.places_RGK] & self._joined.held_RGK).transpose(1, 2)

    def finish(self) -> None:
        """Sweeps, once that is worth it."""
        self._joined = None
        super().finish()

    def _join(self, rows: list[int]) -> Joined:
        """What the heads of `rows` hold, by column of the row (one host sync)."""
        assert self.kept is not None
        R, G, segments = len(rows), self.heads, self._of(rows)
        columns_QK, places_QK = super().key_columns(segments), self.places(segments)
        P = self.cumulative_length
        # Slots beyond a segment's end go to a column behind the last one, which is cut off.
        at_QK = columns_QK.clamp(max=P).long()
        place_QP = places_QK.new_zeros(R * G, P + 1).scatter_(1, at_QK, places_QK)[:, :P]
        held_QP = self.kept.new_zeros(R * G, P + 1).scatter_(1, at_QK, True)[:, :P]
        held_RGP = held_QP.view(R, G, P)
        any_RP = held_RGP.any(1)
        counts: list[int] = any_RP.sum(1).tolist()
        order_RK = (~any_RP).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
        order_RGK = order_RK[:, None].expand(R, G, -1)
        beyond_RK = ~any_RP.gather(1, order_RK)
        held_RGK = held_RGP.gather(2, order_RGK)
        # A place of the head's own where it holds no such key: its first, which is finite.
        first_RG1 = places_QK[:, :1].view(R, G, 1)
        places_RGK = place_QP.view(R, G, P).gather(2, order_RGK).where(held_RGK, first_RG1)
        columns_RK = order_RK.masked_fill(beyond_RK, NO_KEY)
        return Joined(columns_RK, places_RGK, held_RGK, counts)

    # Rows

    def select(self, rows: list[int]) -> None:
        """Row i becomes what `rows[i]` was; repeats are allowed, rows that are not named are forgotten."""
        super().select(self._of(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` adjacent copies of itself."""
        batch = len(self.lengths) // self.heads
        self.select([row for row in range(batch) for _ in range(repeats)])

    def __repr__(self) -> str:
        return (
            f"HeadsLayer({self.heads} heads, seen={self.cumulative_length}, stored={self.lengths}, "
            f"recent={self.keep_recent})"
        )
