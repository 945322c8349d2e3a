"""How the engine lays out a layer's K/V where routing decides about the cache alone.

Shape letters: B rows, S tokens of all rows in one line, G kv heads, H head dim, A gates (1, or G), U units
(B x A), C capacity, W tokens of a ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.cache.range import STEP_TYPE
from modlab.engine.transfer import sent
from modlab.kernels.kept_attention import Stored

NO_BOUND = 2**31 - 1


class RingBuffer(SegmentedBuffer):
    """Each row's segment is a ring of its latest W tokens and, behind it, the older tokens that are kept; see
    `kernels/decode_attention.py`, which goes on with it. Where each KV head has a gate, the heads of a row
    have segments of their own, one after another: `starts`, `lengths` and `capacities` are of B x G.

    Attributes:
        heads: A, segments of a row.
        ring_kept: which tokens of each ring are kept, bool [U, W]; False where there is none yet.
        most: tokens that a segment may hold; None for no bound. With one there are scores, see `budget`:
        scores: of the older tokens, where they are, fp32 [C].
        ring_scores: of those in the rings, fp32 [U, W].
    """

    notes: ClassVar[dict[str, torch.dtype]] = {}
    """Nobody asks in which column a token of a ring stood."""

    heads: int = 1
    ring_kept: Tensor
    most: int | None = None
    scores: Tensor | None = None
    ring_scores: Tensor | None = None

    def lay_out(
        self,
        counts: list[int],
        older: list[int],
        before_AS: Tensor,
        recent: int,
        k_GSH: Tensor,
        v_GSH: Tensor,
        send: Callable[[list[int]], Tensor],
    ) -> Stored:
        """Makes room for a prefill's tokens and for decoding; what a kernel then fills.

        Args:
            counts: tokens of each row.
            older: kept tokens of each unit that are not among the latest of its row.
            before_AS: see `kernels/kept_attention.py`.
            recent: W.
            k_GSH, v_GSH: keys and values of the rows one after another, for their heads and type.
            send: brings numbers to the device, long; those of layers that are laid out alike go once.
        """
        self.heads = len(before_AS)
        latest = [min(n, recent) for n in counts for _ in range(self.heads)]
        lengths = [ring + old for ring, old in zip(latest, older, strict=True)]
        heads = slice(None) if self.heads == 1 else slice(1)
        self.reserve([n + self.slack(n) for n in lengths], k_GSH[heads], v_GSH[heads])
        assert self.keys is not None and self.values is not None
        self.lengths = lengths
        self.ring_kept = torch.zeros(len(lengths), recent, dtype=torch.bool, device=k_GSH.device)
        return Stored(self.keys, self.values, send(self.starts), self.ring_kept, before_AS)

    def shrink(self, older: list[int]) -> None:
        """The layout that `lay_out` would have made of so many older tokens, of one that it made for more.

        Args:
            older: kept tokens of each unit that are not among the latest of its row.
        """
        recent = self.ring_kept.shape[1]
        lengths = [min(n, recent) + old for n, old in zip(self.lengths, older, strict=True)]
        capacities = self._capacities(lengths)
        if capacities != self.capacities:
            spans = list(zip(self.starts, capacities, strict=True))
            for name in self.contents:
                tensor = getattr(self, name)
                setattr(self, name, torch.cat([tensor.narrow(1, *span) for span in spans], dim=1))
            *self.starts, _ = itertools.accumulate(capacities, initial=0)
        self.lengths, self.capacities = lengths, capacities

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row; of its heads on the mean, rounded up."""
        by_row = zip(*[iter(self.lengths)] * self.heads, strict=True)
        return [-(-sum(lengths) // self.heads) for lengths in by_row]

    def grow(self) -> None:
        """As of any buffer, but all segments, of which there may be hundreds, are moved at once."""
        capacities = self._capacities(self.lengths)
        *starts, total = itertools.accumulate(capacities, initial=0)
        assert self.keys is not None
        device = self.keys.device
        moved_U = sent(
            torch.tensor([old - new for old, new in zip(self.starts, starts, strict=True)]), device
        )
        room_U = sent(torch.tensor(capacities), device)
        # A free place takes over what is behind the segment, or the buffer's last place: nobody reads it.
        at_C = torch.arange(total, device=device) + moved_U.repeat_interleave(room_U, output_size=total)
        self._take(at_C.clamp_max(self.keys.shape[1] - 1))
        self.starts, self.capacities = starts, capacities

    @property
    def room(self) -> int:
        """Tokens that the fullest segment can still take; one that may hold no more takes any number."""
        free = [
            capacity - n
            for capacity, n in zip(self.capacities, self.lengths, strict=True)
            if self.most is None or capacity < self.most
        ]
        return min(free, default=NO_BOUND)

    def rebuild(self, places: list[Tensor], lengths: list[int]) -> None:
        """Lays the buffer out again: each segment with what is at these places now, in their order."""
        capacities = self._capacities(lengths)
        pieces = [F.pad(at, (0, c - len(at))) for at, c in zip(places, capacities, strict=True)]
        self._take(torch.cat(pieces))
        *starts, _ = itertools.accumulate(capacities, initial=0)
        self.starts, self.lengths, self.capacities = starts, lengths, capacities

    def _capacities(self, lengths: list[int]) -> list[int]:
        wanted = [n + self.slack(n) for n in lengths]
        return wanted if self.most is None else [min(n, self.most) for n in wanted]

    def _take(self, at_C: Tensor) -> None:
        for name in self.contents:
            setattr(self, name, getattr(self, name).index_select(1, at_C))
        if self.scores is not None:
            self.scores = self.scores[at_C]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several buffers, one after another, in one."""
        whole = super().joined(parts)
        whole.heads = parts[0].heads
        whole.ring_kept = torch.cat([part.ring_kept for part in parts])
        whole.most = parts[0].most
        scores = [(part.scores, part.ring_scores) for part in parts]
        known = [(here, ring) for here, ring in scores if here is not None and ring is not None]
        if known:
            whole.scores, whole.ring_scores = (torch.cat(several) for several in zip(*known, strict=True))
        return whole


class Int8Ring(RingBuffer):
    """The same in eight bits (`cache/int8.py`): keys and values are codes.

    Attributes:
        key_steps, value_steps: [G, C, 1] in half precision.
    """

    contents: ClassVar[tuple[str, ...]] = (*RingBuffer.contents, "key_steps", "value_steps")

    key_steps: Tensor | None
    value_steps: Tensor | None

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Makes room for the codes and steps of keys and values like these [..., G, S, H]."""
        heads, device = keys.shape[-3], keys.device
        for name, size in (("keys", keys.shape[-1]), ("values", values.shape[-1])):
            codes = torch.empty(heads, self.capacity, size, dtype=torch.int8, device=device)
            setattr(self, name, codes)
        self.key_steps, self.value_steps = (
            torch.empty(heads, self.capacity, 1, dtype=STEP_TYPE, device=device) for _ in range(2)
        )
