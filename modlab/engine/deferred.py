"""Layers of a short prompt are laid out as if they kept everything, and given exact room one layer later.

How many keys a layer keeps shapes its buffer, so the host has to know the number to allocate. If it asks in
the middle of the layer, the GPU has nothing but projections to run until the attention has been launched, and
then stands still: .3 ms in each layer of 4,096 tokens of the 8B shape on an H200 (docs/log.md). Here nothing
is asked at that point. The layer's keys go into a buffer in which all tokens have room, and its attention
reads them there. When the next layer comes to its attention the host reads the number, which the GPU had
before it began the layer's attention, and moves what is kept into a buffer of its size. So one layer is held
dense at a time, and next to it, while it is copied, what it keeps.

Which heads keep everything is not known in time either: all of them go by the kernel that passes over what is
not kept, where the dense one would be faster for a head that keeps everything. So a layer waits for its own
number if the layer before it had many such heads and the rows are long (`next_one_waits`). That depends on
nothing but the prompts of the line: the same ones always run in the same way.
"""

from __future__ import annotations

from modlab.engine.ring import RingBuffer
from modlab.engine.transfer import Fetched

MOST_TOKENS = 8192
"""Tokens of a line, all rows of a batch together, up to which this is done, by default. The projections of
4,096 tokens of the 8B shape take an H200 .35 ms, and it then stands still for .3 ms: with twice the tokens it
has work for about as long as the host takes. Beyond, nothing is gained, while what dense kernels save for
heads that keep everything grows with the square."""

LOST_PAIRS = 4096**2 // 2
"""Pairs of query and key in all rows, times the share of heads that keep everything, above which the dense
kernel saves more for these heads than waiting costs. With 4,096 tokens of the 8B shape and gates a KV head an
H200 gains .15 ms a layer by waiting with all heads open, and loses .18 with an eighth of them (docs/log.md).
Other lengths follow from the squares: one row of 4,096 tokens waits with more than half the heads open, one
of 8,192 with more than an eighth, one of less than 2,897 never."""


class DeferredLayouts:
    """The layer of one prefill whose buffer still has room for everything, and what the one before kept.

    Args:
        counts: tokens of each row of the line.
    """

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self._waiting: tuple[RingBuffer, Fetched] | None = None
        self._whole_A = [False]

    def add(self, buffer: RingBuffer, older: Fetched) -> None:
        """Notes a layer that has been laid out in this way, after the one before it has been settled.

        Args:
            older: kept tokens of each unit that are not among the latest of its row.
        """
        assert self._waiting is None, "two layers would be held dense"
        self._waiting = buffer, older

    def settle(self) -> None:
        """Gives the layer that waits exact room; the host waits until the GPU has begun that layer."""
        if self._waiting is not None:
            buffer, fetched = self._waiting
            self._waiting = None
            older = fetched.read()
            self.learn(keep_everything(self.counts, older, buffer.ring_kept.shape[1]))
            buffer.shrink(older)

    def learn(self, whole_A: list[bool]) -> None:
        """Which gates of the latest layer keep everything."""
        self._whole_A = whole_A

    @property
    def next_one_waits(self) -> bool:
        """Whether the next layer is to ask for its own number and be laid out at once: heads of the latest
        one that keep everything had more than `LOST_PAIRS`. The first layer is not."""
        pairs = sum(n * n for n in self.counts)
        return pairs * sum(self._whole_A) > LOST_PAIRS * len(self._whole_A)


def keep_everything(counts: list[int], older: list[int], recent: int) -> list[bool]:
    """Of each gate, whether it keeps every token that later ones could miss.

    Args:
        counts: tokens of each row.
        older: kept tokens of each unit that are not among its row's latest `recent`.
    """
    gates = len(older) // len(counts)
    most = [max(n - recent, 0) for n in counts]
    return [older[gate::gates] == most for gate in range(gates)]
