"""A prompt and the tokens after it, through the kernels of K/V routing, for any rows, heads and shares.

Against a softmax over the tokens that the rule names, which shares no code with kernels or references.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modlab.engine.attention import KeptKeys, LineBlocks
from modlab.engine.ring import RingBuffer
from modlab.kernels import decode_attention, kept_attention
from tests.helpers.batches import cases
from tests.helpers.fast_generation import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

H, STEPS, SCALE = 16, 2, 0.4


def oracle(q_MH: Tensor, k_TH: Tensor, v_TH: Tensor, keep_T: Tensor, recent: int) -> Tensor:
    """Of the last of T tokens, for the query heads of one KV head."""
    T = len(k_TH)
    seen = [t for t in range(T) if bool(keep_T[t]) or T - 1 - t < recent]
    return (q_MH @ k_TH[seen].T * SCALE).softmax(-1) @ v_TH[seen]


@cases(6)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    recent=st.integers(1, 30),
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.6, 1.0]), min_size=1, max_size=3),
    group=st.integers(1, 3),
    by_head=st.booleans(),
    seed=st.integers(0, 9),
)
def test_prompts_and_steps_see_what_the_rule_names(
    counts: list[int], recent: int, shares: list[float], group: int, by_head: bool, seed: int
) -> None:
    G, B, generator = len(shares), len(counts), torch.Generator().manual_seed(seed)
    A = G if by_head else 1
    spans = [n + STEPS for n in counts]
    q, k, v = (
        [torch.randn(heads, n, H, generator=generator).to(DEVICE) for n in spans]
        for heads in (G * group, G, G)
    )
    keep = [(torch.rand(n, A, generator=generator) < torch.tensor(shares[:A])).to(DEVICE) for n in spans]

    def line(rows: list[Tensor]) -> Tensor:
        return torch.cat([row[:, :n] for row, n in zip(rows, counts, strict=True)], 1)[None]

    def want(row: int, T: int) -> Tensor:
        heads = [
            oracle(
                q[row][g * group : (g + 1) * group, T - 1], k[row][g, :T], v[row][g, :T],
                keep[row][:T, g % A], recent,
            )
            for g in range(G)
        ]  # fmt: skip
        return torch.cat(heads)

    bounds = torch.tensor([0, *itertools.accumulate(counts)], device=DEVICE)
    blocks = LineBlocks(counts, DEVICE)
    kept = KeptKeys(torch.cat([row[:n] for row, n in zip(keep, counts, strict=True)]), bounds, recent, blocks)
    buffer, (q1, k1, v1) = RingBuffer(), (line(rows) for rows in (q, k, v))
    stored = buffer.lay_out(counts, kept.older.read(), kept.before, recent, k1[0], v1[0], blocks.sent)
    size = kept_attention.block_size(q1, v1)
    kept_attention.store_kept(k1, v1, blocks.of(size), size, stored)
    every = torch.arange(G, dtype=torch.int32, device=DEVICE)
    out = kept_attention.kept_attention(
        q1,
        k1,
        v1,
        stored,
        blocks.of(size),
        size,
        SCALE,
        every,
        torch.empty(1, sum(counts), G * group, H, device=DEVICE),
    )
    for row, n in enumerate(counts):
        for T in {1, (n + 1) // 2, n}:
            got = out[0, int(bounds[row]) + T - 1]
            torch.testing.assert_close(got, want(row, T), atol=3e-5, rtol=3e-5)

    assert buffer.keys is not None and buffer.values is not None
    addresses = [buffer.keys.data_ptr(), buffer.values.data_ptr(), 0, buffer.capacity, 0, 0, *buffer.starts]
    table = torch.tensor(addresses, device=DEVICE)
    lengths = torch.tensor(buffer.lengths, dtype=torch.int32, device=DEVICE)
    for step in range(STEPS):
        at = [n + step for n in counts]
        new = (torch.stack([row[:, t] for row, t in zip(rows, at, strict=True)]) for rows in (q, k, v))
        decided = torch.cat([row[t] for row, t in zip(keep, at, strict=True)])
        folded = (decode_attention.fold(t, B * A) for t in new)
        position = torch.tensor(at, device=DEVICE)
        got_rows = decode_attention.decode_ring_attention(
            *folded, table, lengths, decided, buffer.ring_kept, position, SCALE
        ).view(B, G * group, H)
        for row, t in enumerate(at):
            torch.testing.assert_close(got_rows[row], want(row, t + 1), atol=3e-5, rtol=3e-5)
            held = [sum(bool(keep[row][s, a]) or t - s < recent for s in range(t + 1)) for a in range(A)]
            assert lengths[row * A : row * A + A].tolist() == held
