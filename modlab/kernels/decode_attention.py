"""One decoding step of attention over a ragged KV cache: append the new key, attend to each row's own length.

The layout is `RaggedLayer`'s: all rows of a layer in one flat buffer, each row in a segment.

    keys, values [G, C, H]    columns [C]    starts [B]    lengths [B]

Rows that skip the layer (`keep` False) append nothing and cost nothing. The Triton kernels reach the buffers
through a table of device addresses, so that a buffer may move (it grows) under a CUDA graph that was captured
before.

Where routing decides about the cache alone (`skip="kv"`), every row attends, and a row's segment is a ring of
its latest W tokens, the token at position p in slot p modulo W, and behind it the older tokens that are kept.
A new token takes the slot of the one that has just become too old, which moves behind the ring if it is kept
and is forgotten if not: nothing is ever swept, and no key is read that may not be seen.

Where each KV head keeps tokens of its own, a head of a row is a row by itself: B x G rows of one KV head,
each with its ring and segment (`fold`). Rows then differ in length as heads do, some of which keep everything
and most hardly anything, so the keys of all rows stand in one line of blocks, of which each program takes an
equal share.

Where a ring's keys and values are stored in eight bits, `decode_int8` has what is done of one head.

Shape letters: B rows, N query heads, G kv heads, H head dim, C capacity of the flat buffer, K keys of a row,
W tokens of a ring, U rows whose heads are rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modlab.cache.int8 import Int8Range
from modlab.kernels.aside import rejoin
from modlab.kernels.decode_int8 import reference_encoded, reference_seen
from modlab.kernels.device import is_before_sm_80, multiprocessors_of
from modlab.kernels.launch import KernelRefused, Sizes, launch

try:
    import triton
    import triton.language as tl

    from modlab.kernels.decode_int8 import attend_codes, store_new
except ImportError:  # no Triton (CPU or macOS builds of torch): the reference below serves
    triton = None


KEYS, VALUES, COLUMNS, CAPACITY, KEY_STEPS, VALUE_STEPS, STARTS = range(7)
"""Slots of a layer's address table, int64 [6 + B]: addresses and the capacity, then each row's start. Steps
are there where keys and values are codes."""

ADDRESS_SLOTS = STARTS
PROGRAMS = 2
"""Programs that read keys, of a multiprocessor at once."""

TILES: tuple[Sizes, ...] = (
    {"BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
)
"""Keys of a block, in half precision. Of seven pairs of programs and blocks the first is the fastest by head
on an H200 (docs/log.md); the others are for GPUs with less room, see `launch`."""

INT8_TILES: tuple[Sizes, ...] = (
    {"BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
)
"""The same of codes: the first has as many bytes a block."""

SMALL_TILES: tuple[Sizes, ...] = (
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
)
"""The same in single precision, or with large heads; of codes, too."""

JOINED = 64
"""Pieces of a head that are joined at once."""


def reference_decode_attention(
    q_BNH: Tensor,
    k_BGH: Tensor,
    v_BGH: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor],
    starts: list[int],
    lengths_B: Tensor,
    keep_B: Tensor,
    column_B: Tensor,
    scale: float,
) -> Tensor:
    """Plain torch: what the kernels below compute.

    Args:
        q_BNH, k_BGH, v_BGH: query, key and value of the one new token of each row.
        buffers: the layer's keys [G, C, H], values [G, C, H] and columns int32 [C]; written in place.
        starts: first slot of each row's segment.
        lengths_B: tokens stored in each row, int32; rows that keep count one more afterwards.
        keep_B: bool, False for rows that skip this layer.
        column_B: column of the new token in the padded batch, int32.
        scale: factor on the scores.

    Returns:
        attention output [B, N, H]; zero in rows that skip.
    """
    keys, values, columns = buffers
    B, N, _ = q_BNH.shape
    out = q_BNH.new_zeros(B, N, v_BGH.shape[2])
    for row in range(B):
        if not keep_B[row]:
            continue
        start = starts[row]
        end = start + int(lengths_B[row]) + 1
        keys[:, end - 1], values[:, end - 1] = k_BGH[row], v_BGH[row]
        columns[end - 1] = column_B[row]
        lengths_B[row] += 1
        out[row] = _softmax_row(q_BNH[row], keys[:, start:end], values[:, start:end], scale)
    return out


def reference_decode_ring_attention(
    q_BNH: Tensor,
    k_BGH: Tensor,
    v_BGH: Tensor,
    buffers: tuple[Tensor, ...],
    starts: list[int],
    lengths_B: Tensor,
    keep_B: Tensor,
    ring_kept_BW: Tensor,
    position_B: Tensor,
    scale: float,
    place_B: Tensor | None = None,
    int8: Int8Range | None = None,
) -> Tensor:
    """Plain torch: what the kernels below compute where routing decides about the cache alone.

    Where heads are rows (`fold`), B counts those.

    Args:
        buffers: the layer's keys [G, C, H] and values [G, C, H], where these are codes followed by the steps
            of both [G, C, 1]; written in place.
        lengths_B: tokens stored in each row, int32: those of its ring, then older ones that are kept. One
            more afterwards, unless the token that leaves a full ring is not kept.
        keep_B: bool, whether the new token's key and value outlive the ring.
        ring_kept_BW: the same of the tokens in the ring, bool; written in place.
        position_B: index of the new token among the real tokens of its row, long; of [B / G] rows whose heads
            are the rows here.
        place_B: where rows have a budget, what `ring_budget` says of the token that leaves a ring, int32.
        int8: of the layer, where it stores codes.

    The rest as in `reference_decode_attention`; returns attention output [B, N, H].
    """
    B, N, _ = q_BNH.shape
    positions, lengths, W = position_B.tolist(), lengths_B.tolist(), ring_kept_BW.shape[1]
    gates = B // len(positions)
    new = (k_BGH, v_BGH) if int8 is None else reference_encoded(int8, k_BGH, v_BGH, len(positions))
    out = q_BNH.new_zeros(B, N, v_BGH.shape[2])
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        position = positions[row // gates]
        slot = start + position % W
        stays = position < W or bool(ring_kept_BW[row, position % W])  # of the one that leaves a full ring
        place = (length if stays else -1) if place_B is None else int(place_B[row])
        if position >= W and place >= 0:
            for tensor in buffers:
                tensor[:, start + place] = tensor[:, slot]
        end = start + length
        if place == length:
            lengths_B[row] += 1
            end += 1
        for tensor, of_rows in zip(buffers, new, strict=True):
            tensor[:, slot] = of_rows[row]
        ring_kept_BW[row, position % W] = keep_B[row]
        stored = [tensor[:, start:end] for tensor in buffers]
        keys, values = stored if int8 is None else reference_seen(int8, stored, row % gates)
        out[row] = _softmax_row(q_BNH[row], keys, values, scale)
    return out


def _softmax_row(q_NH: Tensor, k_GKH: Tensor, v_GKH: Tensor, scale: float) -> Tensor:
    """Attention of one query to all given keys, computed in fp32; [N, H]."""
    repeat = q_NH.shape[0] // k_GKH.shape[0]
    k_NKH, v_NKH = (t.repeat_interleave(repeat, 0).float() for t in (k_GKH, v_GKH))
    scores_N1K = torch.einsum("nh,nkh->nk", q_NH.float(), k_NKH)[:, None] * scale
    return (scores_N1K.softmax(-1) @ v_NKH)[:, 0].to(q_NH.dtype)


def fold(x_BNH: Tensor, rows: int) -> Tensor:
    """[U, N / heads, H] for a cache of `rows` U, the heads of a row one after another; as it is if U is B."""
    return x_BNH if x_BNH.shape[0] == rows else x_BNH.reshape(rows, -1, x_BNH.shape[2])


if triton is not None:

    @triton.jit
    def _running(keep_ptr, rows, B: tl.constexpr, RING: tl.constexpr):
        """1 for rows that attend: those that keep their token; all, where only the cache is decided about."""
        if RING:
            running = (rows < B).to(tl.int32)
        else:
            running = (tl.load(keep_ptr + rows, mask=rows < B, other=0) != 0).to(tl.int32)
        return running

    @triton.jit
    def _place(
        ring_ptr, place_ptr, row, slot, full, length, RING: tl.constexpr, BUDGET: tl.constexpr
    ):  # fmt: skip
        """Where the token that leaves a full ring goes, -1 if nowhere; `length` while the ring fills."""
        if BUDGET:
            place = tl.load(place_ptr + row)
        else:
            stays = tl.load(ring_ptr + row * RING + slot).to(tl.int32)
            place = tl.where(full & (stays == 0), -1, length)
        return place

    @triton.jit
    def _attend_keys(
        q_ptr, k_ptr, v_ptr, table_ptr, column_ptr, part_ptr, part_lse_ptr, ring_ptr, position_ptr, place_ptr,
        stride_qb, stride_qn, stride_kb, stride_kg, stride_vb, stride_vg, scale,
        row, head, first, end, length, part,
        M: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
        GATES: tl.constexpr, RING: tl.constexpr, BUDGET: tl.constexpr, IEEE: tl.constexpr,
    ):  # fmt: skip
        """The keys from `first` to `end` of one kv head, for its M query heads: softmax sums and log-sum, as
        part number `part`. The row had `length` tokens before this one, which its last part stores."""
        element = q_ptr.dtype
        capacity = tl.load(table_ptr + 3)
        start = tl.load(table_ptr + 6 + row)
        # Told that the addresses are aligned, the compiler loads 16 bytes at a time; else 2.
        keys = tl.multiple_of(tl.load(table_ptr).to(element), 16) + (head * capacity + start) * HK
        values = tl.multiple_of(tl.load(table_ptr + 1).to(element), 16) + (head * capacity + start) * HV

        m_ids, hk, hv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_HK), tl.arange(0, BLOCK_HV)
        in_m, in_hk, in_hv = m_ids < M, hk < HK, hv < HV
        q = tl.load(
            q_ptr + row * stride_qb + (head * M + m_ids)[:, None] * stride_qn + hk[None, :],
            mask=in_m[:, None] & in_hk[None, :], other=0.0,
        )  # fmt: skip
        top = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_HV], tl.float32)
        precision: tl.constexpr = "ieee" if IEEE else "tf32"
        stored = tl.minimum(end, length)
        hidden = -1  # slot of a token that may not be seen
        if RING:
            position = tl.load(position_ptr + row // GATES)
            slot_new, full = position % RING, position >= RING
            place = _place(ring_ptr, place_ptr, row, slot_new, full, length, RING, BUDGET)
            if place < length:  # it goes, or another one makes room for it
                hidden = tl.where(place < 0, slot_new, place).to(tl.int32)
        for at in range(first, stored, BLOCK_K):
            ids = (at + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside = (ids < stored) & (ids != hidden)
            k = tl.load(
                keys + ids[None, :] * HK + hk[:, None], mask=inside[None, :] & in_hk[:, None], other=0.0
            )
            scores = tl.dot(q, k, input_precision=precision) * scale
            scores = tl.where(inside[None, :], scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new_top[:, None])
            fade = tl.exp(top - new_top)
            v = tl.load(
                values + ids[:, None] * HV + hv[None, :], mask=inside[:, None] & in_hv[None, :], other=0.0
            )
            total = total * fade + tl.sum(weights, 1)
            acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
            top = new_top
        if (first <= length) & (end == length + 1):  # the part that ends with the new token stores it
            k_new = tl.load(k_ptr + row * stride_kb + head * stride_kg + hk, mask=in_hk, other=0.0)
            v_new = tl.load(v_ptr + row * stride_vb + head * stride_vg + hv, mask=in_hv, other=0.0)
            if RING:  # behind the ring; the ring's own slot is written once all parts have read it
                stays = (place >= 0).to(tl.int32)
                moves, into = stays * full.to(tl.int32), place.to(tl.int64)
                k_old = tl.load(keys + slot_new * HK + hk, mask=hk < HK * moves, other=0.0)
                v_old = tl.load(values + slot_new * HV + hv, mask=hv < HV * moves, other=0.0)
                tl.store(keys + into * HK + hk, tl.where(full, k_old, k_new), mask=hk < HK * stays)
                tl.store(values + into * HV + hv, tl.where(full, v_old, v_new), mask=hv < HV * stays)
            else:
                at_new = length.to(tl.int64)
                tl.store(keys + at_new * HK + hk, k_new, mask=in_hk)
                tl.store(values + at_new * HV + hv, v_new, mask=in_hv)
                if head == 0:
                    columns = tl.load(table_ptr + 2).to(tl.pointer_type(tl.int32))
                    tl.store(columns + start + at_new, tl.load(column_ptr + row))
            scores_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
            new_top = tl.maximum(top, scores_new)
            weights_new = tl.exp(scores_new - new_top)
            fade = tl.exp(top - new_top)
            total = total * fade + weights_new
            acc = acc * fade[:, None] + weights_new[:, None] * v_new.to(tl.float32)[None, :]
            top = new_top
        acc = acc / tl.maximum(total, 1e-30)[:, None]
        lse = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-30)), -1e30)
        slot = part * M + m_ids
        tl.store(part_ptr + slot[:, None] * HV + hv[None, :], acc, mask=in_m[:, None] & in_hv[None, :])
        tl.store(part_lse_ptr + slot, lse, mask=in_m)

    @triton.jit
    def _attend_share(
        q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, keep_ptr, column_ptr, part_ptr, part_lse_ptr,
        share_ptr, ring_ptr, position_ptr, place_ptr,
        stride_qb, stride_qn, stride_kb, stride_kg, stride_vb, stride_vg, scale,
        shift_ptr, key_step_ptr, value_step_ptr,
        G: tl.constexpr, M: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
        B: tl.constexpr, BLOCK_B: tl.constexpr, GATES: tl.constexpr,
        RING: tl.constexpr, BUDGET: tl.constexpr, IEEE: tl.constexpr, INT8: tl.constexpr,
        DIGITS: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """One program's share of all blocks of keys: pieces of one head or of several.

        Programs and heads are both in order, so a program's number plus a head's (of all rows) is a number
        that no other piece has, and those of a head follow each other.
        """
        rows, program = tl.arange(0, BLOCK_B), tl.program_id(0)
        lengths_B = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
        blocks_B = tl.cdiv(lengths_B + 1, BLOCK_K) * _running(keep_ptr, rows, B, RING)  # with this token
        ends_B = tl.cumsum(blocks_B, 0) * G
        total = tl.sum(blocks_B, 0).to(tl.int64) * G
        programs = tl.minimum(total, tl.num_programs(0))  # each of them has a block at least
        if program >= programs:
            return
        at = (program * total // programs).to(tl.int32)
        stop = ((program + 1) * total // programs).to(tl.int32)
        while at < stop:
            row = tl.sum((ends_B <= at).to(tl.int32), 0)
            blocks = tl.sum(tl.where(rows == row, blocks_B, 0), 0)
            inside = at - tl.sum(tl.where(rows == row, ends_B, 0), 0) + blocks * G
            head, block = inside // blocks, inside % blocks
            count = tl.minimum(blocks - block, stop - at)
            piece = program + row * G + head
            if block == 0:  # for those who join them, by when lengths may have changed
                last = ((at + blocks).to(tl.int64) * programs - 1) // total
                tl.store(share_ptr + (row * G + head) * 2, piece)
                tl.store(share_ptr + (row * G + head) * 2 + 1, (last - program + 1).to(tl.int32))
            length = tl.load(lengths_ptr + row)
            first = block * BLOCK_K
            end = tl.minimum(first + count * BLOCK_K, length + 1)
            if INT8:
                position = tl.load(position_ptr + row // GATES)
                slot_new, full = position % RING, position >= RING
                place = _place(ring_ptr, place_ptr, row, slot_new, full, length, RING, BUDGET)
                attend_codes(
                    q_ptr, k_ptr, v_ptr, table_ptr, part_ptr, part_lse_ptr,
                    stride_qb, stride_qn, stride_kb, stride_kg, stride_vb, stride_vg, scale,
                    row, head, first, end, length, piece, slot_new, full, place,
                    shift_ptr, key_step_ptr, value_step_ptr,
                    M, HK, HV, BLOCK_HK, BLOCK_HV, BLOCK_M, BLOCK_K, GATES, IEEE, DIGITS, ASM,
                )  # fmt: skip
            else:
                _attend_keys(
                    q_ptr, k_ptr, v_ptr, table_ptr, column_ptr, part_ptr, part_lse_ptr, ring_ptr,
                    position_ptr, place_ptr,
                    stride_qb, stride_qn, stride_kb, stride_kg, stride_vb, stride_vg, scale,
                    row, head, first, end, length, piece,
                    M, HK, HV, BLOCK_HK, BLOCK_HV, BLOCK_M, BLOCK_K, GATES, RING, BUDGET, IEEE,
                )  # fmt: skip
            at += count

    @triton.jit
    def _join_parts(
        part_ptr, part_lse_ptr, share_ptr, out_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, keep_ptr,
        ring_ptr, position_ptr, place_ptr, stride_kb, stride_kg, stride_vb, stride_vg,
        shift_ptr, key_step_ptr, value_step_ptr,
        N: tl.constexpr, G: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_P: tl.constexpr,
        B: tl.constexpr, GATES: tl.constexpr, RING: tl.constexpr, BUDGET: tl.constexpr,
        INT8: tl.constexpr,
    ):  # fmt: skip
        """The parts of one row and query head, weighted by their log-sums; counts the new token."""
        row, head = tl.program_id(0), tl.program_id(1)
        hv = tl.arange(0, BLOCK_HV)
        in_hv = hv < HV
        out = out_ptr + (row * N + head) * HV + hv
        if _running(keep_ptr, row, B, RING) == 0:
            tl.store(out, tl.zeros([BLOCK_HV], tl.float32).to(out_ptr.dtype.element_ty), mask=in_hv)
            return
        M: tl.constexpr = N // G
        unit = row * G + head // M
        first, parts = tl.load(share_ptr + unit * 2), tl.load(share_ptr + unit * 2 + 1)
        top, total, acc = -1e30, 0.0, tl.zeros([BLOCK_HV], tl.float32)
        for begin in range(0, parts, BLOCK_P):
            ids = begin + tl.arange(0, BLOCK_P)
            slot = (first + ids) * M + head % M
            lse = tl.load(part_lse_ptr + slot, mask=ids < parts, other=-float("inf"))
            new_top = tl.maximum(top, tl.max(lse, 0))
            weights, fade = tl.exp(lse - new_top), tl.exp(top - new_top)
            part = tl.load(
                part_ptr + slot[:, None] * HV + hv[None, :],
                mask=(ids < parts)[:, None] & in_hv[None, :], other=0.0,
            )  # fmt: skip
            total = total * fade + tl.sum(weights, 0)
            acc = acc * fade + tl.sum(part * weights[:, None], 0)
            top = new_top
        tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=in_hv)
        if RING:
            position = tl.load(position_ptr + row // GATES)
            slot_new, full = position % RING, position >= RING
            if full & (head % (N // G) == 0):
                if INT8:
                    store_new(
                        k_ptr, v_ptr, table_ptr, stride_kb, stride_kg, stride_vb, stride_vg, row, head // M,
                        slot_new, shift_ptr, key_step_ptr, value_step_ptr, HK, HV, BLOCK_HK, BLOCK_HV, GATES,
                    )  # fmt: skip
                else:
                    kv_head, hk = head // (N // G), tl.arange(0, BLOCK_HK)
                    in_hk = hk < HK
                    at = kv_head * tl.load(table_ptr + 3) + tl.load(table_ptr + 6 + row) + slot_new
                    k_new = tl.load(k_ptr + row * stride_kb + kv_head * stride_kg + hk, mask=in_hk, other=0.0)
                    v_new = tl.load(v_ptr + row * stride_vb + kv_head * stride_vg + hv, mask=in_hv, other=0.0)
                    tl.store(tl.load(table_ptr).to(k_ptr.dtype) + at * HK + hk, k_new, mask=in_hk)
                    tl.store(tl.load(table_ptr + 1).to(v_ptr.dtype) + at * HV + hv, v_new, mask=in_hv)
            if head == 0:
                length = tl.load(lengths_ptr + row)
                place = _place(ring_ptr, place_ptr, row, slot_new, full, length, RING, BUDGET)
                tl.store(lengths_ptr + row, tl.where(place == length, length + 1, length))
                tl.store(ring_ptr + row * RING + slot_new, tl.load(keep_ptr + row))
        elif head == 0:
            tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + 1)


@torch.library.custom_op("modlab::decode_attention", mutates_args=("lengths_B",))
def decode_attention(
    q_BNH: Tensor,
    k_BGH: Tensor,
    v_BGH: Tensor,
    table: Tensor,
    lengths_B: Tensor,
    keep_B: Tensor,
    column_B: Tensor,
    scale: float,
) -> Tensor:
    """`reference_decode_attention` by two Triton kernels, for use inside a CUDA graph.

    Args:
        table: int64 [6 + B], see `KEYS`; the buffers it points to are written.

    The rest, and the result, as there; the innermost dimension of q, k and v must be contiguous.
    """
    return _attend(q_BNH, k_BGH, v_BGH, table, lengths_B, keep_B, column_B, scale, None, None)


@torch.library.custom_op("modlab::decode_ring_attention", mutates_args=("lengths_B", "ring_kept_BW"))
def decode_ring_attention(
    q_BNH: Tensor,
    k_BGH: Tensor,
    v_BGH: Tensor,
    table: Tensor,
    lengths_B: Tensor,
    keep_B: Tensor,
    ring_kept_BW: Tensor,
    position_B: Tensor,
    scale: float,
    place_B: Tensor | None = None,
    key_shift: Tensor | None = None,
    key_step: Tensor | None = None,
    value_step: Tensor | None = None,
) -> Tensor:
    """`reference_decode_ring_attention` by the same kernels; arguments as there and in `decode_attention`,
    the last three those of the layer's `Int8Range` where it stores codes.

    Raises:
        KernelRefused: codes of heads of an odd size.
    """
    ring, channels = (ring_kept_BW, position_B, place_B), None
    if key_shift is not None and key_step is not None and value_step is not None:
        channels = (key_shift, key_step, value_step)
    return _attend(q_BNH, k_BGH, v_BGH, table, lengths_B, keep_B, lengths_B, scale, ring, channels)


def _attend(
    q_BNH: Tensor,
    k_BGH: Tensor,
    v_BGH: Tensor,
    table: Tensor,
    lengths_B: Tensor,
    keep_B: Tensor,
    column_B: Tensor,
    scale: float,
    ring: tuple[Tensor, Tensor, Tensor | None] | None,
    channels: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Both kernels; `ring` holds flags [B, W], positions [B] and, with a budget, places [B]; `channels` what
    codes are measured against: shift and step of keys, step of values."""
    B, N, HK = q_BNH.shape
    G, HV = v_BGH.shape[1:]
    device, half = q_BNH.device, q_BNH.element_size() == 2
    if channels is not None and (HK % 2 or HV % 2):
        raise KernelRefused(f"keys and values in eight bits are read in pairs of channels, of {HK} and {HV}")
    least = 16 if channels is None else 32  # of which a dot product takes half
    programs = PROGRAMS * multiprocessors_of(device)
    ring_kept, position, place = (lengths_B, lengths_B, None) if ring is None else ring
    places = lengths_B if place is None else place  # none of the three is read without need
    layout: dict[str, Any] = {
        "G": G, "HK": HK, "HV": HV, "BLOCK_HK": max(least, triton.next_power_of_2(HK)),
        "B": B, "GATES": B // len(position), "RING": 0 if ring is None else ring_kept.shape[1],
        "BUDGET": place is not None, "INT8": channels is not None,
    }  # fmt: skip
    parts = programs + B * G
    part = torch.empty(parts * (N // G), HV, dtype=torch.float32, device=device)
    part_lse = torch.empty(parts * (N // G), dtype=torch.float32, device=device)
    share = torch.empty(B * G, 2, dtype=torch.int32, device=device)
    out = torch.empty(B, N, HV, dtype=q_BNH.dtype, device=device)
    strides = (k_BGH.stride(0), k_BGH.stride(1), v_BGH.stride(0), v_BGH.stride(1))
    measured = channels or (lengths_B,) * 3  # not read without codes
    attended = (
        q_BNH, k_BGH, v_BGH, table, lengths_B, keep_B, column_B, part, part_lse, share, ring_kept, position,
        places, q_BNH.stride(0), q_BNH.stride(1), *strides, scale, *measured,
    )  # fmt: skip
    blocks: dict[str, Any] = {
        "M": N // G, "BLOCK_M": max(16, triton.next_power_of_2(N // G)),
        "BLOCK_HV": max(least, triton.next_power_of_2(HV)), "BLOCK_B": triton.next_power_of_2(B),
        "IEEE": not half, "ASM": channels is not None and half and device.type == "cuda",
        "DIGITS": channels is not None and half and not is_before_sm_80(device),
    }  # fmt: skip
    large = TILES if channels is None else INT8_TILES
    tiles = large if half and max(HK, HV) <= 128 else SMALL_TILES
    launch(_attend_share, (programs,), *attended, **blocks, **layout, tiles=tiles)
    if ring is not None:
        rejoin(device)  # who is kept was decided meanwhile
    launch(
        _join_parts, (B, N),
        part, part_lse, share, out, k_BGH, v_BGH, table, lengths_B, keep_B, ring_kept, position, places,
        *strides, *measured, N=N, BLOCK_HV=triton.next_power_of_2(HV), BLOCK_P=JOINED, **layout,
        tiles=({"num_warps": 4},),
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(q_BNH, k_BGH, v_BGH, table, lengths_B, keep_B, column_B, scale):  # type: ignore[no-untyped-def]
    return q_BNH.new_empty(q_BNH.shape[0], q_BNH.shape[1], v_BGH.shape[2])


@decode_ring_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q_BNH, k_BGH, v_BGH, table, lengths_B, keep_B, ring_kept_BW, position_B, scale, place_B=None,
    key_shift=None, key_step=None, value_step=None,
):  # fmt: skip
    return q_BNH.new_empty(q_BNH.shape[0], q_BNH.shape[1], v_BGH.shape[2])
