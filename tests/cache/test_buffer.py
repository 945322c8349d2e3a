"""The segmented buffer by itself: where tokens are, and that they stay what they are whatever is moved.

Shape letters: G kv heads, H head dim, S tokens.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from modlab.cache.buffer import SegmentedBuffer, empty_like
from modlab.cache.layer import RaggedLayer
from modlab.engine.ring import RingBuffer

CPU = torch.device("cpu")
G, HK, HV = 2, 3, 5


def token(row: int, number: int, size: int) -> Tensor:
    """Key or value [G, H] of one token, told apart from all others."""
    return (100 * row + number) + torch.arange(G * size).reshape(G, size) / 100


def filled(lengths: list[int], capacities: list[int] | None = None) -> SegmentedBuffer:
    buffer = SegmentedBuffer()
    buffer.reserve(capacities or lengths, torch.empty(G, 0, HK), torch.empty(G, 0, HV))
    assert buffer.keys is not None and buffer.values is not None and buffer.columns is not None
    for row, (start, n) in enumerate(zip(buffer.starts, lengths, strict=True)):
        for i in range(n):
            buffer.keys[:, start + i], buffer.values[:, start + i] = token(row, i, HK), token(row, i, HV)
            buffer.columns[start + i] = 100 * row + i
    buffer.lengths = list(lengths)
    return buffer


def check(buffer: SegmentedBuffer, rows: list[list[tuple[int, int]]]) -> None:
    """Row i of the buffer holds exactly these tokens, each (row, number) of `filled`."""
    assert buffer.keys is not None and buffer.values is not None
    assert buffer.lengths == [len(row) for row in rows]
    assert buffer.keys.shape == (G, buffer.capacity, HK) and buffer.values.shape == (G, buffer.capacity, HV)
    for start, row in zip(buffer.starts, rows, strict=True):
        for i, (source, number) in enumerate(row):
            assert torch.equal(buffer.keys[:, start + i], token(source, number, HK))
            assert torch.equal(buffer.values[:, start + i], token(source, number, HV))
            if buffer.columns is not None:
                assert buffer.columns[start + i] == 100 * source + number


def whole(*rows: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """All n tokens of each (row, n)."""
    return [[(row, i) for i in range(n)] for row, n in rows]


def test_it_needs_nothing_of_transformers() -> None:
    code = "import sys, modlab.cache.buffer; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([0, 1, 2], whole((0, 3), (1, 0), (2, 5))),
        ([2, 0], whole((2, 5), (0, 3))),
        ([1, 1, 2, 2], whole((1, 0), (1, 0), (2, 5), (2, 5))),
    ],
    ids=["same", "fewer", "repeated"],
)
def test_rows_are_chosen(rows: list[int], want: list[list[tuple[int, int]]]) -> None:
    buffer = filled([3, 0, 5], capacities=[4, 2, 9])
    buffer.select(rows)
    check(buffer, want)
    assert buffer.capacities == [n + 16 for n in buffer.lengths]


def test_growth_leaves_a_32nd_or_16_tokens() -> None:
    buffer = filled([3, 2000])
    assert buffer.room == 0 and buffer.capacity == 2003
    buffer.grow()
    check(buffer, whole((0, 3), (1, 2000)))
    assert buffer.capacities == [19, 2062] and buffer.room == 16


def test_the_first_layout_is_exact_and_later_ones_have_slack() -> None:
    buffer = SegmentedBuffer()
    buffer.make_room([4, 1], CPU)
    assert buffer.capacities == [4, 1] and buffer.columns is not None and buffer.keys is None
    buffer.lengths = [4, 1]
    buffer.make_room([0, 0], CPU)
    assert buffer.capacities == [4, 1], "there is room already"
    buffer.make_room([1, 0], CPU)
    assert buffer.capacities == [5 + 16, 1 + 16]


def test_only_survivors_are_moved() -> None:
    class EverySecond(SegmentedBuffer):
        def survivors(self, row: int) -> Tensor:
            return torch.arange(self.starts[row], self.starts[row] + self.lengths[row], 2)

    buffer = filled([5, 2])
    buffer.__class__ = EverySecond
    buffer.rearrange([1, 0], room=False)
    check(buffer, [[(1, 0)], [(0, 0), (0, 2), (0, 4)]])
    assert buffer.capacity == 4


@pytest.mark.parametrize("kind", [SegmentedBuffer, RingBuffer])
def test_parts_are_joined(kind: type[SegmentedBuffer]) -> None:
    parts = [filled([2, 1], capacities=[3, 4]), filled([3])]
    for part in parts:
        part.__class__ = kind
        if isinstance(part, RingBuffer):
            part.columns, part.ring_kept = None, torch.ones(len(part.lengths), 4, dtype=torch.bool)
    joined = kind.joined(parts)
    assert type(joined) is kind and joined.capacities == [3, 4, 3] and joined.starts == [0, 3, 7]
    assert joined.keys is not None and joined.values is not None
    for start, (row, n) in zip(joined.starts, [(0, 2), (1, 1), (0, 3)], strict=True):
        for i in range(n):
            assert torch.equal(joined.keys[:, start + i], token(row, i, HK))
            assert torch.equal(joined.values[:, start + i], token(row, i, HV))
    if isinstance(joined, RingBuffer):
        assert joined.ring_kept.shape == (3, 4) and joined.columns is None


def test_places() -> None:
    buffer = filled([2, 3], capacities=[5, 6])
    assert buffer.free_places([1, 0], 2).tolist() == [[8, 9], [2, 3]]
    assert buffer.last_places([0, 1], 2).tolist() == [[0, 1], [6, 7]]
    assert buffer.places([0, 1]).tolist() == [[0, 1, 1], [5, 6, 7]], "a shorter row repeats its last token"


@pytest.mark.parametrize("rows", [[1], [0, 1]], ids=str)
def test_notes_are_written_where_tokens_will_stand(rows: list[int]) -> None:
    buffer = filled([1, 2], capacities=[4, 5])
    buffer.note("columns", rows, torch.tensor([[7, 8]] * len(rows)), 2)
    for row in rows:
        buffer.lengths[row] += 2
        noted = buffer.noted("columns", [row])[0].tolist()
        assert noted == [100 * row + i for i in range(buffer.lengths[row] - 2)] + [7, 8]


def test_room_is_made_like_its_source() -> None:
    assert empty_like(torch.zeros(4, dtype=torch.int32), 7).shape == (7,)
    assert empty_like(torch.zeros(4, 3), 7).shape == (7, 3)
    assert empty_like(torch.zeros(2, 4, 3, dtype=torch.float16), 0).shape == (2, 0, 3)


def test_what_is_forgotten_frees_its_memory() -> None:
    layer = RaggedLayer()
    one = torch.ones(1, 2, 3, 4)
    layer.update(one, one)
    layer.clear()
    assert layer.keys is layer.values is layer.columns is None and not layer.lengths
    assert layer.get_seq_length() == 0 and not layer.is_initialized
