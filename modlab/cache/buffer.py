"""Keys and values of all rows of a batch in one flat buffer, each row in a segment of its own length.

    keys, values [G, C, H]   | row 0 ......... free | row 1 ... free | row 2 ............ free |
    columns      [C]         | where in the padded batch each stored token stood

so that allocated bytes follow stored tokens, whatever the rows' imbalance. Nothing of transformers is in
here: `RaggedLayer` makes a cache layer of it, the engine decodes from it as it is.

Shape letters: R rows of one group, S new tokens, K keys of a row, G kv heads, H head dim, C capacity of the
flat buffer in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor


def empty_like(source: Tensor, capacity: int) -> Tensor:
    """Room for so many tokens, in other respects as `source` [C] or [..., C, H]."""
    if source.dim() == 1:
        return source.new_empty(capacity)
    return source.new_empty(*source.shape[:-2], capacity, source.shape[-1])


class SegmentedBuffer:
    """Tokens of several rows, each row in a segment of one buffer.

    The first layout allocates exactly what is asked for. Growth after that leaves each row `slack(n)` free
    tokens, so that decoding moves the buffer once every 16 stored tokens or more.

    Attributes:
        keys, values: [G, C, H]; None before `allocate`.
        columns: int32 [C]; None before the first layout.
        starts, lengths, capacities: of each row's segment, in tokens.
    """

    notes: ClassVar[dict[str, torch.dtype]] = {"columns": torch.int32}
    """Attributes [C] that say something of each stored token, with their types."""

    contents: ClassVar[tuple[str, ...]] = ("keys", "values")
    """Attributes [..., C, H] that are made once heads, type and device are known."""

    keys: Tensor | None
    values: Tensor | None
    columns: Tensor | None = None
    starts: list[int]
    lengths: list[int]
    capacities: list[int]

    def __init__(self) -> None:
        self.clear()

    @staticmethod
    def slack(length: int) -> int:
        """Free tokens left to a row of `length` tokens when its segment grows: 16 or 1/32, the larger."""
        return max(16, length // 32)

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        for name in (*self.notes, *self.contents):
            setattr(self, name, None)
        self.starts, self.lengths, self.capacities = [], [], []

    @property
    def rows(self) -> list[int]:
        """All rows, in order."""
        return list(range(len(self.lengths)))

    @property
    def capacity(self) -> int:
        """Tokens of all rows that there is room for, C."""
        return sum(self.capacities)

    @property
    def room(self) -> int:
        """Tokens that the fullest row can still take."""
        return min(c - n for c, n in zip(self.capacities, self.lengths, strict=True))

    # Layout

    def reserve(self, capacities: list[int], keys: Tensor, values: Tensor) -> None:
        """Lays out empty segments of these capacities, one a row; head counts, head dims, dtype and device as
        in the given K/V [..., G, S, H].
        """
        self._open(len(capacities))
        self.rearrange(self.rows, capacities, keys.device)
        self.allocate(keys, values)

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Makes room for keys and values like these [..., G, S, H], as much as is laid out."""
        self.keys, self.values = (
            empty_like(like[(0,) * (like.dim() - 3)], self.capacity) for like in (keys, values)
        )

    def make_room(self, counts: list[int], device: torch.device) -> None:
        """Makes sure that each row b can take `counts[b]` more tokens: exactly those at first, with some
        slack when it grows."""
        if not self.lengths:
            self._open(len(counts))
        needed = [n + new for n, new in zip(self.lengths, counts, strict=True)]
        if any(n > c for n, c in zip(needed, self.capacities, strict=True)):
            grows = any(self.lengths)
            self.rearrange(self.rows, [n + self.slack(n) * grows for n in needed], device)

    def grow(self) -> None:
        """Gives each row room for `slack(n)` tokens more."""
        self.rearrange(self.rows, [n + self.slack(n) for n in self.lengths])

    def select(self, rows: list[int]) -> None:
        """Row i becomes what `rows[i]` was; repeats are allowed, rows that are not named are forgotten."""
        if not self.lengths:
            return
        if self._device() is None:
            self._open(len(rows))
        else:
            self.rearrange(rows)

    def rearrange(
        self,
        rows: list[int],
        capacities: list[int] | None = None,
        device: torch.device | None = None,
        room: bool = True,
    ) -> None:
        """Lays the buffer out again with the old `rows` as its rows (repeats allowed), each with what
        survives of it.

        Args:
            capacities: of the new segments. By default what is stored, with `room` for a few tokens more.
            device: of the first layout; later ones stay where they are.
        """
        survivors = [self.survivors(row) for row in rows]
        lengths = [s.stop - s.start if isinstance(s, slice) else len(s) for s in survivors]
        if capacities is None:
            capacities = [n + self.slack(n) if room else n for n in lengths]
        starts = [sum(capacities[:i]) for i in range(len(rows))]
        for name in (*self.notes, *self.contents):
            old = getattr(self, name)
            if old is not None:
                new = empty_like(old, sum(capacities))
                for start, n, chosen in zip(starts, lengths, survivors, strict=True):
                    _copy(old, chosen, new, start, n)
                setattr(self, name, new)
            elif name in self.notes:
                new = torch.empty(sum(capacities), dtype=self.notes[name], device=device or self._device())
                setattr(self, name, new)
        self.starts, self.lengths, self.capacities = starts, lengths, capacities

    def survivors(self, row: int) -> slice | Tensor:
        """Places of the row's tokens that outlive the next layout, in order."""
        return slice(self.starts[row], self.starts[row] + self.lengths[row])

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several buffers of this class, one after another, in one."""
        whole, at = cls(), 0
        for part in parts:
            whole.starts += [at + start for start in part.starts]
            whole.lengths += part.lengths
            whole.capacities += part.capacities
            at += part.capacity
        for name in (*cls.notes, *cls.contents):
            pieces = [getattr(part, name) for part in parts]
            if all(piece is not None for piece in pieces):
                setattr(whole, name, torch.cat(pieces, dim=max(pieces[0].dim() - 2, 0)))
        return whole

    def _open(self, rows: int) -> None:
        """So many rows without a token or room for one."""
        self.starts, self.lengths, self.capacities = ([0] * rows for _ in range(3))

    def _device(self) -> torch.device | None:
        known = (getattr(self, name) for name in (*self.notes, *self.contents))
        return next((tensor.device for tensor in known if tensor is not None), None)

    # Places in the flat buffer

    def note(self, name: str, rows: list[int], values_RS: Tensor | bool, S: int) -> None:
        """Writes down in the tensor `name` what holds of the next S tokens of `rows`, of each or of all."""
        target = getattr(self, name)
        if len(rows) == 1:
            at = self.starts[rows[0]] + self.lengths[rows[0]]
            target[at : at + S] = values_RS[0] if isinstance(values_RS, Tensor) else values_RS
        elif isinstance(values_RS, Tensor):
            target[self.free_places(rows, S)] = values_RS.to(target.dtype)
        else:
            target[self.free_places(rows, S)] = values_RS

    def noted(self, name: str, rows: list[int]) -> Tensor:
        """What the tensor `name` says of all tokens of `rows`, [R, K]; past a row's end, its last one."""
        target: Tensor = getattr(self, name)
        if len(rows) == 1:
            start = self.starts[rows[0]]
            return target[None, start : start + self.lengths[rows[0]]]
        return target[self.places(rows)]

    def free_places(self, rows: list[int], S: int) -> Tensor:
        """The next S places of each of `rows`, [R, S]."""
        return self._places_up_to([self.starts[row] + self.lengths[row] + S for row in rows], S)

    def last_places(self, rows: list[int], S: int) -> Tensor:
        """Where the latest S tokens of each of `rows` are, [R, S]."""
        return self._places_up_to([self.starts[row] + self.lengths[row] for row in rows], S)

    def _places_up_to(self, ends: list[int], S: int) -> Tensor:
        device = self._device()
        return torch.tensor(ends, device=device)[:, None] + torch.arange(-S, 0, device=device)

    def places(self, rows: list[int]) -> Tensor:
        """Where all tokens of `rows` are, [R, K]; beyond a row's length its last one again."""
        device = self._device()
        starts_R1 = torch.tensor([[self.starts[row]] for row in rows], device=device)
        last_R1 = torch.tensor([[max(self.lengths[row] - 1, 0)] for row in rows], device=device)
        K = max(self.lengths[row] for row in rows)
        return starts_R1 + torch.minimum(torch.arange(K, device=device), last_R1)


def _copy(old: Tensor, chosen: slice | Tensor, new: Tensor, start: int, n: int) -> None:
    """The `chosen` tokens of one buffer, into another one from `start` on."""
    along = max(old.dim() - 2, 0)
    into = new.narrow(along, start, n)
    if isinstance(chosen, slice):
        into.copy_(old.narrow(along, chosen.start, n))
    else:
        into.copy_(old.index_select(along, chosen))
