"""The keys of a decoding step in eight bits: what `decode_attention` does of one head where codes are stored.

What differs from channel to channel is moved out of the loop over keys (`cache/int8.py`): channels' steps of
keys to the query and those of values to the output, without rounding. The shift of keys adds the same to all
scores of a query, and so falls out of the softmax: it is never added. In the loop a key's score and weight
are multiplied by its own steps; that, and how codes get to the tensor cores, is what is done of each key.

Keys stay whole numbers. The query becomes one of 15 bits, in two digits of eight: its largest entry has them
all, where bfloat16 has eight, and two products of whole numbers are exact. (In single precision, and on GPUs
before sm_80, keys become numbers of its type.)

Values meet weights, which need more digits: there codes become numbers of half precision, whatever the
model's type, which has every whole number up to 2,048. They are loaded in pairs: two channels that stand side
by side are one number of 16 bits, which is copied into shared memory and on into the tensor cores' order as
any such number is; single bytes would go one by one. Even and odd channels are then two matrices of half the
width.

Shape letters: B rows, G kv heads, H head dim, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modlab.cache.int8 import Int8Range

try:
    import triton
    import triton.language as tl

    from modlab.kernels.int8 import code_of, inverse, step_of
except ImportError:  # see decode_attention
    triton = None


def reference_encoded(int8: Int8Range, k_BGH: Tensor, v_BGH: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Of new keys and values what is stored: codes [B, G, H] of both, then steps [B, G, 1] of both. Heads may
    be rows; if they were not, there would be so many `rows`."""
    k, v = (x.reshape(rows, -1, 1, x.shape[2]) for x in (k_BGH, v_BGH))
    (key_codes, key_steps), (value_codes, value_steps) = int8.encode_keys(k), int8.encode_values(v)
    new = (key_codes, value_codes, key_steps, value_steps)
    return tuple(x.reshape(*k_BGH.shape[:2], -1) for x in new)


def reference_seen(int8: Int8Range, stored: list[Tensor], head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a row, fp32 [G, K, H], from codes of both and steps of both; `head` is the first of
    its heads: its own where heads are rows, else 0."""
    key_codes, value_codes, key_steps, value_steps = stored
    heads = slice(head, head + len(key_codes))
    keys = int8.decode_keys(key_codes, key_steps, torch.float32, heads)
    return keys, int8.decode_values(value_codes, value_steps, torch.float32, heads)


if triton is not None:

    @triton.jit
    def encode_new(x_H, shift_H, step_H):
        """Codes int8 [H] of one new key or value, and its step, fp16."""
        x_H = (x_H.to(tl.float32) - shift_H) * inverse(step_H)
        step = step_of(tl.max(tl.abs(x_H), 0))
        return code_of(x_H, step.to(tl.float32)).to(tl.int8), step

    @triton.jit
    def _halves(pairs, IEEE: tl.constexpr, ASM: tl.constexpr):
        """Codes of even and of odd channels, as numbers that tensor cores take.

        By bits, four codes at a time: 128 + code as the lowest digits of 1,024 in half precision, less 1,152.
        """
        if ASM:
            even, odd = tl.inline_asm_elementwise(
                """{
                .reg .b32 raised, low, high, less;
                xor.b32 raised, $2, 0x80808080;
                mov.b32 less, 0x64806480;
                prmt.b32 low, raised, 0x64646464, 0x4240;
                prmt.b32 high, raised, 0x64646464, 0x4341;
                sub.f16x2 $0, low, less;
                sub.f16x2 $1, high, less;
                }""",
                "=r,=r,r",
                [pairs],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            number: tl.constexpr = tl.float32 if IEEE else tl.float16
            even, odd = ((pairs << 8) >> 8).to(number), (pairs >> 8).to(number)
        return even, odd

    @triton.jit
    def attend_codes(
        q_ptr, k_ptr, v_ptr, table_ptr, part_ptr, part_lse_ptr,
        stride_qb, stride_qn, stride_kb, stride_kg, stride_vb, stride_vg, scale,
        row, head, first, end, length, part, slot_new, full, place,
        shift_ptr, key_step_ptr, value_step_ptr,
        M: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
        BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
        GATES: tl.constexpr, IEEE: tl.constexpr, DIGITS: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """As `_attend_keys` of `decode_attention`, over a ring.

        Args:
            slot_new, full: of the new token in the ring, and whether another one leaves it there.
            place: where that goes; see `_place`.
        """
        capacity = tl.load(table_ptr + 3)
        segment = head * capacity + tl.load(table_ptr + 6 + row)
        # Told that the addresses are aligned, the compiler loads 16 bytes at a time; else 2.
        keys = tl.multiple_of(tl.load(table_ptr).to(tl.pointer_type(tl.int8)), 16) + segment * HK
        values = tl.multiple_of(tl.load(table_ptr + 1).to(tl.pointer_type(tl.int16)), 16)
        values += segment * (HV // 2)
        key_steps = tl.load(table_ptr + 4).to(tl.pointer_type(tl.float16)) + segment
        value_steps = tl.load(table_ptr + 5).to(tl.pointer_type(tl.float16)) + segment

        number: tl.constexpr = tl.float32 if IEEE else tl.float16
        precision: tl.constexpr = "ieee" if IEEE else "tf32"
        m_ids = tl.arange(0, BLOCK_M)
        hk, hv, pv = tl.arange(0, BLOCK_HK), tl.arange(0, BLOCK_HV), tl.arange(0, BLOCK_HV // 2)
        in_m, in_hk, in_hv, in_pv = m_ids < M, hk < HK, hv < HV, pv < HV // 2
        channels = head + row % GATES  # one of the two is 0
        step_hk = tl.load(key_step_ptr + channels * HK + hk, mask=in_hk, other=1.0)
        q = tl.load(
            q_ptr + row * stride_qb + (head * M + m_ids)[:, None] * stride_qn + hk[None, :],
            mask=in_m[:, None] & in_hk[None, :], other=0.0,
        ).to(tl.float32) * step_hk[None, :]  # fmt: skip
        size = tl.zeros([BLOCK_M], tl.float32) + scale * 1.4426950408889634  # the softmax here has base 2
        if not IEEE:
            places: tl.constexpr = 13.0 if DIGITS else 0.0
            bits = places - tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(q), 1), 1e-30)))
            q *= tl.exp2(bits)[:, None]
            size *= tl.exp2(-bits)
        if DIGITS:  # adding 1.5 x 2^23 rounds
            q = (q + 12582912.0) - 12582912.0
            upper = (q * 0.00390625 + 0.001 + 12582912.0) - 12582912.0  # of 128 the next one
            q_upper, q_lower = upper.to(tl.int8), (q - upper * 256.0).to(tl.int8)

        top = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        even = tl.zeros([BLOCK_M, BLOCK_HV // 2], tl.float32)
        odd = tl.zeros([BLOCK_M, BLOCK_HV // 2], tl.float32)
        stored = tl.minimum(end, length)
        hidden = -1  # slot of a token that may not be seen
        if place < length:  # it goes, or another one makes room for it
            hidden = tl.where(place < 0, slot_new, place).to(tl.int32)
        ahead = first + tl.arange(0, BLOCK_K)
        next_k = tl.load(key_steps + ahead, mask=ahead < stored, other=0.0)
        next_v = tl.load(value_steps + ahead, mask=ahead < stored, other=0.0)
        for at in range(first, stored, BLOCK_K):
            ids = at + tl.arange(0, BLOCK_K)
            known, far = ids < stored, ids.to(tl.int64)
            k = tl.load(keys + far[None, :] * HK + hk[:, None], mask=known[None, :] & in_hk[:, None], other=0)
            # A block ahead, as the compiler does with keys and values; of loads this small it does not.
            step_k, step_v = next_k.to(tl.float32), next_v.to(tl.float32)
            ahead = ids + BLOCK_K
            next_k = tl.load(key_steps + ahead, mask=ahead < stored, other=0.0)
            next_v = tl.load(value_steps + ahead, mask=ahead < stored, other=0.0)
            if not DIGITS:
                scores = tl.dot(q.to(number), k.to(number), input_precision=precision)
            else:
                larger = tl.dot(q_upper, k, out_dtype=tl.int32)
                scores = (larger * 256 + tl.dot(q_lower, k, out_dtype=tl.int32)).to(tl.float32)
            # Hidden keys are what they are after all products: of a block of nothing else a product fused
            # with the difference below would leave its rounding, which is large there.
            scores *= step_k[None, :] * size[:, None]
            scores = tl.where((known & (ids != hidden))[None, :], scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            v = tl.load(
                values + far[:, None] * (HV // 2) + pv[None, :], mask=known[:, None] & in_pv[None, :], other=0
            )
            total = total * fade + tl.sum(weights, 1)
            # Times 32 a usual step is near 1: small weights stay as precise as they are.
            weights = (weights * (step_v * 32.0)[None, :]).to(number)
            v_even, v_odd = _halves(v, IEEE, ASM)
            even = tl.dot(weights, v_even, even * fade[:, None], input_precision=precision)
            odd = tl.dot(weights, v_odd, odd * fade[:, None], input_precision=precision)
            top = new_top
        step_even = tl.load(value_step_ptr + channels * HV + pv * 2, mask=in_pv, other=1.0)
        step_odd = tl.load(value_step_ptr + channels * HV + pv * 2 + 1, mask=in_pv, other=1.0)
        even *= (step_even * 0.03125)[None, :]
        odd *= (step_odd * 0.03125)[None, :]
        if (first <= length) & (end == length + 1):  # the part that ends with the new token stores it
            k_new = tl.load(k_ptr + row * stride_kb + head * stride_kg + hk, mask=in_hk, other=0.0)
            v_new = tl.load(v_ptr + row * stride_vb + head * stride_vg + hv, mask=in_hv, other=0.0)
            shift = tl.load(shift_ptr + channels * HK + hk, mask=in_hk, other=0.0)
            step_hv = tl.load(value_step_ptr + channels * HV + hv, mask=in_hv, other=1.0)
            k_new, k_step = encode_new(k_new, shift, step_hk)
            v_new, v_step = encode_new(v_new, 0.0, step_hv)
            # Behind the ring; the ring's own slot is written once all parts have read it.
            stays = (place >= 0).to(tl.int32)
            moves, into = stays * full.to(tl.int32), place.to(tl.int64)
            codes = values.to(tl.pointer_type(tl.int8))
            k_old = tl.load(keys + slot_new * HK + hk, mask=hk < HK * moves, other=0)
            v_old = tl.load(codes + slot_new * HV + hv, mask=hv < HV * moves, other=0)
            k_old_step = tl.load(key_steps + slot_new, mask=moves > 0, other=0.0)
            v_old_step = tl.load(value_steps + slot_new, mask=moves > 0, other=0.0)
            tl.store(keys + into * HK + hk, tl.where(full, k_old, k_new), mask=hk < HK * stays)
            tl.store(codes + into * HV + hv, tl.where(full, v_old, v_new), mask=hv < HV * stays)
            tl.store(key_steps + into, tl.where(full, k_old_step, k_step), mask=stays > 0)
            tl.store(value_steps + into, tl.where(full, v_old_step, v_step), mask=stays > 0)
            v_even, v_odd = tl.split(
                tl.reshape(v_new.to(tl.float32) * (step_hv * v_step.to(tl.float32)), [BLOCK_HV // 2, 2])
            )
            scores_new = tl.sum(q * k_new.to(tl.float32)[None, :], 1) * (size * k_step.to(tl.float32))
            new_top = tl.maximum(top, scores_new)
            weights_new = tl.exp2(scores_new - new_top)
            fade = tl.exp2(top - new_top)
            total = total * fade + weights_new
            even = even * fade[:, None] + weights_new[:, None] * v_even[None, :]
            odd = odd * fade[:, None] + weights_new[:, None] * v_odd[None, :]
            top = new_top
        lse = tl.where(total > 0, (top + tl.log2(tl.maximum(total, 1e-30))) * 0.6931471805599453, -1e30)
        share = (1.0 / tl.maximum(total, 1e-30))[:, None]
        slot = part * M + m_ids
        out, in_out = part_ptr + slot[:, None] * HV + pv[None, :] * 2, in_m[:, None] & in_pv[None, :]
        tl.store(out, even * share, mask=in_out)
        tl.store(out + 1, odd * share, mask=in_out)
        tl.store(part_lse_ptr + slot, lse, mask=in_m)

    @triton.jit
    def store_new(
        k_ptr, v_ptr, table_ptr, stride_kb, stride_kg, stride_vb, stride_vg, row, head, slot_new,
        shift_ptr, key_step_ptr, value_step_ptr,
        HK: tl.constexpr, HV: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr,
        GATES: tl.constexpr,
    ):  # fmt: skip
        """Writes the new token of one head into its slot of the ring."""
        hk, hv = tl.arange(0, BLOCK_HK), tl.arange(0, BLOCK_HV)
        in_hk, in_hv = hk < HK, hv < HV
        channels = head + row % GATES
        shift = tl.load(shift_ptr + channels * HK + hk, mask=in_hk, other=0.0)
        step_hk = tl.load(key_step_ptr + channels * HK + hk, mask=in_hk, other=1.0)
        step_hv = tl.load(value_step_ptr + channels * HV + hv, mask=in_hv, other=1.0)
        k = tl.load(k_ptr + row * stride_kb + head * stride_kg + hk, mask=in_hk, other=0.0)
        v = tl.load(v_ptr + row * stride_vb + head * stride_vg + hv, mask=in_hv, other=0.0)
        k_codes, k_step = encode_new(k, shift, step_hk)
        v_codes, v_step = encode_new(v, 0.0, step_hv)
        at = head * tl.load(table_ptr + 3) + tl.load(table_ptr + 6 + row) + slot_new
        tl.store(tl.load(table_ptr).to(tl.pointer_type(tl.int8)) + at * HK + hk, k_codes, mask=in_hk)
        tl.store(tl.load(table_ptr + 1).to(tl.pointer_type(tl.int8)) + at * HV + hv, v_codes, mask=in_hv)
        tl.store(tl.load(table_ptr + 4).to(tl.pointer_type(tl.float16)) + at, k_step)
        tl.store(tl.load(table_ptr + 5).to(tl.pointer_type(tl.float16)) + at, v_step)
