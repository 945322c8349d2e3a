"""How the engine lays out a layer's K/V where routing decides about the cache alone.

Shape letters: B rows, S tokens of all rows in one line, G kv heads, H head dim, W tokens of a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer
from modlab.kernels.kept_attention import KeptKeys


class RingBuffer(SegmentedBuffer):
    """Each row's segment is a ring of its latest W tokens and, behind it, the older tokens that are kept; see
    `kernels/decode_attention.py`, which goes on with it.

    Attributes:
        ring_kept: which tokens of the ring are kept, bool [B, W]; False where there is none yet.
    """

    notes: ClassVar[dict[str, torch.dtype]] = {}
    """Nobody asks in which column a token of a ring stood."""

    ring_kept: Tensor

    def fill(
        self,
        k_GSH: Tensor,
        v_GSH: Tensor,
        counts: list[int],
        keep_S: Tensor,
        kept: KeptKeys,
        recent: int,
    ) -> None:
        """Lays the layer out with room for decoding.

        Args:
            k_GSH, v_GSH: keys and values of the rows one after another.
            counts: tokens of each row.
            keep_S: which tokens are kept, bool.
            kept: those.
            recent: W.
        """
        lengths = [min(n, recent) + old for n, old in zip(counts, kept.older, strict=True)]
        self.reserve([n + self.slack(n) for n in lengths], k_GSH[None], v_GSH[None])
        self.ring_kept = keep_S.new_zeros(len(counts), recent)
        assert self.keys is not None and self.values is not None
        first, first_kept = 0, 0
        for row, (start, n, old) in enumerate(zip(self.starts, counts, kept.older, strict=True)):
            end, ring = first + n, min(n, recent)
            turned = n % recent if n > recent else 0  # place of the oldest token in the ring
            pieces = [(end - ring, turned, ring - turned), (end - turned, 0, turned)]
            for buffer, line, gathered in (
                (self.keys, k_GSH, kept.keys),
                (self.values, v_GSH, kept.values),
            ):
                for source, place, size in pieces:
                    into = slice(start + place, start + place + size)
                    buffer[:, into] = line[:, source : source + size]
                buffer[:, start + ring : start + ring + old] = gathered[:, first_kept : first_kept + old]
            for source, place, size in pieces:
                self.ring_kept[row, place : place + size] = keep_S[source : source + size]
            first, first_kept = end, first_kept + kept.per_row[row]
        self.lengths = lengths

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several buffers, one after another, in one."""
        whole = super().joined(parts)
        whole.ring_kept = torch.cat([part.ring_kept for part in parts])
        return whole
