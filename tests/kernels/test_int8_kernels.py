"""The Triton kernels for keys and values in eight bits against their plain references.

Without a GPU in Triton's interpreter, as in `test_decode_kernels`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modlab.cache.int8 import Int8Range
from modlab.kernels import decode_attention as attention
from modlab.kernels import int8 as kernels
from modlab.kernels import ring_budget

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's dot misreads bfloat16
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])


def range_of(heads: int, key_dim: int, value_dim: int, generator: torch.Generator) -> Int8Range:
    """Channels of unlike sizes, one of them of keys that are a hundred times as large and hardly vary."""
    int8 = Int8Range(heads, key_dim, value_dim)
    int8.key_shift.copy_(torch.randn(heads, key_dim, generator=generator))
    int8.key_shift[:, 1] = 100.0
    for step in (int8.key_step, int8.value_step):
        step.copy_(torch.exp2(torch.randint(-3, 3, step.shape, generator=generator).float()))
    return int8.to(DEVICE)


def drawn(int8: Int8Range, values: bool, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Keys (or values) [B, G, H] in that range."""
    x = torch.randn(shape, generator=generator).to(DEVICE)
    return x * int8.value_step if values else int8.key_shift + x * int8.key_step


@TYPES
@pytest.mark.parametrize(
    ("S", "G", "HK", "HV"), [(2, 1, 16, 16), (70, 2, 64, 64), (33, 3, 48, 24), (40, 1, 256, 128)], ids=str
)
def test_a_prompt_is_encoded_as_its_reference_says_bit_for_bit(
    S: int, G: int, HK: int, HV: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(S)
    int8 = range_of(G, HK, HV, generator)
    line = [drawn(int8, values, (S, G, (HK, HV)[values]), generator).to(dtype) for values in (False, True)]
    line[0][0] = int8.key_shift.to(dtype)  # nothing is left of it
    line[1][0] = 0.0
    k, v = (x.transpose(0, 1)[None] for x in line)
    got, want = kernels.encode(int8, k, v), kernels.reference_encode(int8, k, v)
    for name in ("codes", "steps", "seen"):
        for one, other in zip(getattr(got, name), getattr(want, name), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one, other), name
    assert int(want.codes[0].abs().max()) == 127


class Stored:
    """A layer's codes and steps, with room for a few tokens more behind each row.

    Args:
        heads: of the buffer: 1 where heads are rows.
    """

    def __init__(self, int8: Int8Range, lengths: list[int], heads: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.tensor([0, *(n + 16 for n in lengths)]).cumsum(0).tolist()
        self.starts, self.capacity = starts[:-1], starts[-1]
        shapes = [(heads, self.capacity, step.shape[1]) for step in (int8.key_step, int8.value_step)]
        codes = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in shapes]
        steps = [torch.rand(heads, self.capacity, 1, generator=generator) * 0.04 + 0.001 for _ in (1, 2)]
        self.buffers = tuple(t.to(DEVICE) for t in (*codes, *(s.half() for s in steps)))
        for tensor in self.buffers:  # nobody reads where no token is
            for start, n in zip(self.starts, lengths, strict=True):
                tensor[:, start + n : start + n + 16] = 99 if tensor.dtype == torch.int8 else torch.nan
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def table(self, notes: Tensor | None = None) -> Tensor:
        keys, values, key_steps, value_steps = (t.data_ptr() for t in self.buffers)
        notes_at = 0 if notes is None else notes.data_ptr()
        slots = [keys, values, notes_at, self.capacity, key_steps, value_steps]
        return torch.tensor([*slots, *self.starts], device=DEVICE)


def same(got: Stored, want: Stored) -> None:
    assert torch.equal(got.lengths, want.lengths)
    for one, other in zip(got.buffers, want.buffers, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@TYPES
@pytest.mark.parametrize(
    ("W", "positions", "G", "M", "HK", "HV", "by_head"),
    [
        (1, [0, 4], 1, 1, 16, 16, False),
        (4, [0, 3, 4, 11], 2, 2, 16, 16, False),
        (5, [40], 1, 8, 48, 24, False),
        (5, [200, 3], 3, 2, 32, 32, True),
        (130, [126, 150], 1, 3, 64, 64, False),
        (7, [40], 2, 2, 256, 256, True),
    ],
    ids=["alone", "filling", "odd-heads", "by-head", "blocks", "large-heads"],
)
@pytest.mark.parametrize("tile", [0, -1], ids=["usual", "smallest"])
def test_a_step_over_codes_equals_its_reference(
    W: int, positions: list[int], G: int, M: int, HK: int, HV: int, by_head: bool, tile: int,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Steps enough to turn small rings once; codes and steps are the same bit for bit. The smallest tile runs
    as on the GPUs that need it, without products of whole numbers."""
    for name in ("INT8_TILES", "SMALL_TILES"):
        monkeypatch.setattr(attention, name, getattr(attention, name)[tile:])
    if tile:
        monkeypatch.setattr(attention, "is_before_sm_80", lambda device: True)
    B, generator = len(positions), torch.Generator().manual_seed(7)
    int8 = range_of(G, HK, HV, generator)
    A = G if by_head else 1
    lengths = [min(p, W) + (p - W) // (2 + gate) * (p > W) for p in positions for gate in range(A)]
    U, heads = B * A, G // A
    stored = [Stored(int8, lengths, heads, seed=3) for _ in range(2)]
    ring = torch.rand(U, W, generator=generator) < 0.5
    rings = [ring.to(DEVICE).clone() for _ in range(2)]
    channels = (int8.key_shift, int8.key_step, int8.value_step)
    for step in range(min(W + 2, 6)):
        q = torch.randn(B, G * M, HK, generator=generator).to(DEVICE, dtype)
        k = drawn(int8, False, (B, G, HK), generator).to(dtype)
        v = drawn(int8, True, (B, G, HV), generator).to(dtype)
        new = [attention.fold(x, U) for x in (q, k, v)]
        keep = (torch.rand(U, generator=generator) < 0.5).to(DEVICE)
        position = torch.tensor(positions, device=DEVICE) + step
        want = attention.reference_decode_ring_attention(
            *new, stored[0].buffers, stored[0].starts, stored[0].lengths, keep, rings[0], position, 0.02,
            int8=int8,
        )  # fmt: skip
        got = attention.decode_ring_attention(
            *new, stored[1].table(), stored[1].lengths, keep, rings[1], position, 0.02, None, *channels
        )
        assert torch.isfinite(got).all()
        atol = TOLERANCE[dtype] * float(want.abs().max())
        torch.testing.assert_close(got, want, atol=atol, rtol=TOLERANCE[dtype])
        assert torch.equal(*rings)
        same(stored[1], stored[0])


@pytest.mark.parametrize("edge", [128, -128, 127, 8191.5, 0.3])
def test_digits_of_a_query_hold_at_their_edges(edge: float) -> None:
    """In half precision a query is a whole number of two digits; all entries are at an edge of the lower."""
    G, M, H, lengths = 1, 2, 64, [40]
    generator = torch.Generator().manual_seed(2)
    int8, stored = range_of(G, H, H, generator), [Stored(Int8Range(G, H, H), lengths, G, 5) for _ in range(2)]
    q = torch.full((1, M, H), edge / 8192, device=DEVICE) / int8.key_step
    q[..., 0] = 1.0 / int8.key_step[0, 0]
    new = [q.to(HALF), *(drawn(int8, values, (1, G, H), generator).to(HALF) for values in (False, True))]
    keep, position = torch.ones(1, dtype=torch.bool, device=DEVICE), torch.tensor([100], device=DEVICE)
    rings = [torch.zeros(1, 4, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    want = attention.reference_decode_ring_attention(
        *new, stored[0].buffers, stored[0].starts, stored[0].lengths, keep, rings[0], position, 0.5, int8=int8
    )
    channels = (int8.key_shift, int8.key_step, int8.value_step)
    got = attention.decode_ring_attention(
        *new, stored[1].table(), stored[1].lengths, keep, rings[1], position, 0.5, None, *channels
    )
    tolerance = TOLERANCE[HALF] / 4 * float(want.abs().max())
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("by_head", [False, True])
def test_a_row_that_is_full_gives_up_codes_and_steps_together(by_head: bool) -> None:
    W, most, G, H, rows, T = 3, 2, 2, 16, 2, 12
    generator = torch.Generator().manual_seed(1)
    int8 = range_of(G, H, H, generator)
    A = G if by_head else 1
    U = rows * A
    stored = [Stored(int8, [0] * U, G // A, seed=3) for _ in range(2)]
    scores = [torch.full((s.capacity,), torch.nan, device=DEVICE) for s in stored]
    rings = [torch.zeros(U, W, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    budgets = [
        ring_budget.RingBudget(
            torch.full((U, W), torch.nan, device=DEVICE),
            torch.zeros(U, dtype=torch.int32, device=DEVICE),
            torch.tensor([most], dtype=torch.int32, device=DEVICE),
            keep_first=1,
        )
        for _ in range(2)
    ]
    table = stored[1].table(scores[1])
    for t in range(T):
        gate = torch.rand(U, generator=generator).to(DEVICE)
        position = torch.full((rows,), t, device=DEVICE)
        new = [torch.randn(rows, 2 * G, H, generator=generator).to(DEVICE)]
        new += [drawn(int8, values, (rows, G, H), generator) for values in (False, True)]
        new = [attention.fold(x, U) for x in new]
        ring_budget.reference_make_room(
            budgets[0], scores[0], stored[0].starts, stored[0].lengths, rings[0], gate, position
        )
        ring_budget.make_room(
            table, stored[1].lengths, rings[1], gate, position, budgets[1].scores_UW, budgets[1].place_U,
            budgets[1].most_1, 1,
        )  # fmt: skip
        keep = gate > 0.3
        want = attention.reference_decode_ring_attention(
            *new, stored[0].buffers, stored[0].starts, stored[0].lengths, keep, rings[0], position, 0.3,
            budgets[0].place_U, int8,
        )  # fmt: skip
        got = attention.decode_ring_attention(
            *new, table, stored[1].lengths, keep, rings[1], position, 0.3, budgets[1].place_U,
            int8.key_shift, int8.key_step, int8.value_step,
        )  # fmt: skip
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        same(stored[1], stored[0])
    assert stored[0].lengths.tolist() == [W + most] * U


def test_the_reference_sees_what_the_range_decodes() -> None:
    """Against a softmax over decoded keys, shift included: what the kernels never add."""
    W, T, G, H = 3, 20, 2, 16
    generator = torch.Generator().manual_seed(0)
    int8 = range_of(G, H, H, generator)
    keys, values = (drawn(int8, which, (T, G, H), generator) for which in (False, True))
    seen = int8.rounded(keys.transpose(0, 1), values.transpose(0, 1))
    keep = (torch.rand(T, generator=generator) < 0.4).to(DEVICE)
    stored, ring = Stored(int8, [0], G, seed=1), torch.zeros(1, W, dtype=torch.bool, device=DEVICE)
    stored.buffers = tuple(t.new_zeros(t.shape[0], T, t.shape[2]) for t in stored.buffers)
    for t in range(T):
        q = torch.randn(1, G, H, generator=generator).to(DEVICE)
        got = attention.reference_decode_ring_attention(
            q, keys[t][None], values[t][None], stored.buffers, [0], stored.lengths, keep[t : t + 1], ring,
            torch.tensor([t]), 0.05, int8=int8,
        )  # fmt: skip
        those = [s for s in range(t + 1) if keep[s] or t - s < W]
        weights = (torch.einsum("gh,gkh->gk", q[0], seen[0][:, those]) * 0.05).softmax(-1)
        want = torch.einsum("gk,gkh->gh", weights, seen[1][:, those])
        torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)
