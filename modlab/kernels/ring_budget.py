"""Where the token that leaves a ring goes if a row may hold no more than so many older tokens (`skip="kv"`).

A full row gives up the older token of the lowest score: the new one takes its slot, which nobody reads in
this step. So a row never holds more than its ring and its budget, and nothing is moved or swept.

The score of a token is its gate; first tokens, which are kept whatever their gate, have `PROTECTED`.

Shape letters: U rows of a layer's cache (see `decode_attention`), B rows, C capacity of the flat buffer, W
tokens of a ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modlab.kernels.aside import rejoin
from modlab.kernels.launch import launch

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

PROTECTED = 2.0
"""Above every gate."""

FORGOTTEN = -1
"""The place of a token that is not stored any longer."""

SCORES = 2
"""Slot of a layer's address table that holds the address of the scores, fp32 [C]; a ring has no columns."""

BLOCK = 1024


@dataclass
class RingBudget:
    """What bounds one layer's rows in a step.

    Attributes:
        scores_UW: of the tokens in each ring, fp32.
        place_U: written: where the token that leaves a row's ring goes (while the ring fills, the new one),
            counted from the row's first slot, int32; `FORGOTTEN` if nowhere.
        most_1: older tokens of a row at most, int32.
        keep_first: tokens before this position are protected.
    """

    scores_UW: Tensor
    place_U: Tensor
    most_1: Tensor
    keep_first: int


def score_of(gate: Tensor, position: Tensor, keep_first: int) -> Tensor:
    """Of tokens with these gates, fp32, of the gates' shape; positions have that of their first axes."""
    first = position < keep_first
    return gate.masked_fill(first.view(*first.shape, *[1] * (gate.dim() - first.dim())), PROTECTED)


def reference_make_room(
    budget: RingBudget,
    scores_C: Tensor,
    starts: list[int],
    lengths_U: Tensor,
    ring_kept_UW: Tensor,
    gate_U: Tensor,
    position_B: Tensor,
) -> None:
    """Plain torch: what the kernel below computes.

    Args:
        scores_C: of the older tokens, where they are; written for the one that leaves its ring.
        starts: first slot of each row's segment.
        lengths_U: tokens stored in each row, int32, before this step.
        ring_kept_UW: which tokens of each ring are kept.
        gate_U: of the new tokens, whose scores take their slots in the rings.
        position_B: index of the new token among the real ones of its row.
    """
    recent, gates = ring_kept_UW.shape[1], len(starts) // len(position_B)
    score_U = score_of(gate_U, position_B.repeat_interleave(gates), budget.keep_first)
    for unit, start in enumerate(starts):
        position, place = int(position_B[unit // gates]), int(lengths_U[unit])
        slot = position % recent
        if position >= recent:
            leaving, older = budget.scores_UW[unit, slot], scores_C[start + recent : start + place]
            if not ring_kept_UW[unit, slot]:
                place = FORGOTTEN
            elif len(older) >= int(budget.most_1):
                lowest = older.min() if len(older) else torch.tensor(torch.inf)
                place = recent + int(older.argmin()) if leaving > lowest else FORGOTTEN
            if place != FORGOTTEN:
                scores_C[start + place] = leaving
        budget.scores_UW[unit, slot] = score_U[unit]
        budget.place_U[unit] = place


if triton is not None:

    @triton.jit
    def _make_room(
        table_ptr, lengths_ptr, ring_ptr, gate_ptr, position_ptr, scores_ptr, place_ptr, most_ptr, keep_first,
        GATES: tl.constexpr, W: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row of the cache."""
        unit = tl.program_id(0)
        position, length = tl.load(position_ptr + unit // GATES), tl.load(lengths_ptr + unit)
        slot = unit * W + position % W
        older = tl.load(table_ptr + 2).to(tl.pointer_type(tl.float32)) + tl.load(table_ptr + 6 + unit)
        place = length
        if position >= W:
            leaving = tl.load(scores_ptr + slot)
            if tl.load(ring_ptr + slot).to(tl.int32) == 0:
                place = length * 0 - 1
            elif length - W >= tl.load(most_ptr):
                lowest, where = float("inf"), length * 0 - 1
                for first in range(W, length, BLOCK):
                    ids = first + tl.arange(0, BLOCK)
                    scores = tl.load(older + ids, mask=ids < length, other=float("inf"))
                    least = tl.min(scores, 0)
                    at = tl.min(tl.where(scores == least, ids, length), 0)
                    where = tl.where(least < lowest, at, where)
                    lowest = tl.minimum(least, lowest)
                place = tl.where(leaving > lowest, where, -1)
            if place >= 0:
                tl.store(older + place, leaving)
        gate = tl.load(gate_ptr + unit)
        tl.store(scores_ptr + slot, tl.where(position < keep_first, FIRST, gate))
        tl.store(place_ptr + unit, place)


@torch.library.custom_op("modlab::make_room", mutates_args=("scores_UW", "place_U"))
def make_room(
    table: Tensor,
    lengths_U: Tensor,
    ring_kept_UW: Tensor,
    gate_U: Tensor,
    position_B: Tensor,
    scores_UW: Tensor,
    place_U: Tensor,
    most_1: Tensor,
    keep_first: int,
) -> None:
    """`reference_make_room` by a Triton kernel, for use inside a CUDA graph; `scores_UW` to `keep_first` are
    those of a `RingBudget`, `table` holds the address of the scores that it writes (`SCORES`)."""
    U, W = ring_kept_UW.shape
    rejoin(table.device)  # gates were computed meanwhile
    launch(
        _make_room, (U,),
        table, lengths_U, ring_kept_UW.view(torch.int8), gate_U, position_B, scores_UW, place_U, most_1,
        keep_first, GATES=U // len(position_B), W=W, FIRST=PROTECTED, BLOCK=BLOCK,
        tiles=({"num_warps": 4},),
    )  # fmt: skip


@make_room.register_fake
def _(table, lengths_U, ring_kept_UW, gate_U, position_B, scores_UW, place_U, most_1, keep_first):  # type: ignore[no-untyped-def]
    return None
