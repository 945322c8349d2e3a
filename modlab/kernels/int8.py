"""Keys and values of a prompt in eight bits: what is stored of them, and what attention sees, in one pass.

`cache/int8.py` says what they mean, and its `Int8Range` is the plain torch reference. The functions of a
single number below are those of a decoding step too, which encodes its token where it stores it
(`decode_attention`).

Shape letters: S tokens of all rows in one line, G kv heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modlab.cache.int8 import Int8Range
from modlab.cache.range import STEP_TYPE
from modlab.kernels.launch import launch

try:
    import triton
    import triton.language as tl
except ImportError:  # see decode_attention
    triton = None

BLOCK = 32
"""Tokens that one program takes."""


@dataclass(frozen=True)
class Encoded:
    """Keys and values of a line, each pair in this order.

    Attributes:
        codes: int8 [1, G, S, H].
        steps: fp16 [1, G, S, 1].
        seen: as attention sees them, of the type that they were given in, [1, G, S, H].
    """

    codes: tuple[Tensor, Tensor]
    steps: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor]


def reference_encode(int8: Int8Range, k_1GSH: Tensor, v_1GSH: Tensor) -> Encoded:
    """Plain torch: what the kernel below computes, bit for bit.

    Args:
        int8: of the layer.
        k_1GSH, v_1GSH: as its attention has computed them.
    """
    key_codes, key_steps = int8.encode_keys(k_1GSH)
    value_codes, value_steps = int8.encode_values(v_1GSH)
    keys = int8.decode_keys(key_codes, key_steps, k_1GSH.dtype)
    values = int8.decode_values(value_codes, value_steps, v_1GSH.dtype)
    return Encoded((key_codes, value_codes), (key_steps, value_steps), (keys, values))


if triton is not None:

    @triton.jit
    def inverse(step):
        """1 / step of a power of two: exactly, by its exponent."""
        return (0x7F000000 - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

    @triton.jit
    def step_of(largest):
        """The step of numbers of which this is the largest, fp16."""
        return tl.minimum(tl.maximum(tl.div_rn(largest, 127.0), 0.00006103515625), 2047.0).to(tl.float16)

    @triton.jit
    def code_of(x, step):
        """The code of a number, still fp32. Division is torch's; adding 1.5 x 2^23 rounds to even."""
        near = (tl.div_rn(x, step) + 12582912.0) - 12582912.0
        return tl.minimum(tl.maximum(near, -127.0), 127.0)

    @triton.jit
    def _encode_block(
        x_ptr, shift, step, codes_ptr, steps_ptr, seen_ptr, stride_s, at, inside,
        H: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """These tokens of one head; its channels' shift and step are [BLOCK_H]."""
        h = tl.arange(0, BLOCK_H)
        mask = inside[:, None] & (h < H)[None, :]
        x = tl.load(x_ptr + at[:, None] * stride_s + h[None, :], mask=mask, other=0.0).to(tl.float32)
        x = (x - shift[None, :]) * inverse(step)[None, :]
        own = step_of(tl.max(tl.abs(x), 1))
        codes = code_of(x, own.to(tl.float32)[:, None])
        into = at[:, None] * H + h[None, :]
        tl.store(codes_ptr + into, codes.to(tl.int8), mask=mask)
        tl.store(steps_ptr + at, own, mask=inside)
        seen = shift[None, :] + step[None, :] * (codes * own.to(tl.float32)[:, None])
        tl.store(seen_ptr + into, seen.to(seen_ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["S"])
    def _encode(
        k_ptr, v_ptr, shift_ptr, key_step_ptr, value_step_ptr,
        key_codes_ptr, value_codes_ptr, key_steps_ptr, value_steps_ptr, keys_ptr, values_ptr,
        stride_kg, stride_ks, stride_vg, stride_vs, S,
        HK: tl.constexpr, HV: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_HV: tl.constexpr,
        BLOCK_S: tl.constexpr,
    ):  # fmt: skip
        """One block of tokens of one head."""
        head = tl.program_id(1).to(tl.int64)
        at = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
        hk, hv, line = tl.arange(0, BLOCK_HK), tl.arange(0, BLOCK_HV), head * S
        shift = tl.load(shift_ptr + head * HK + hk, mask=hk < HK, other=0.0)
        step = tl.load(key_step_ptr + head * HK + hk, mask=hk < HK, other=1.0)
        _encode_block(
            k_ptr + head * stride_kg, shift, step, key_codes_ptr + line * HK, key_steps_ptr + line,
            keys_ptr + line * HK, stride_ks, at, at < S, HK, BLOCK_HK,
        )  # fmt: skip
        step = tl.load(value_step_ptr + head * HV + hv, mask=hv < HV, other=1.0)
        _encode_block(
            v_ptr + head * stride_vg, tl.zeros_like(step), step, value_codes_ptr + line * HV,
            value_steps_ptr + line, values_ptr + line * HV, stride_vs, at, at < S, HV, BLOCK_HV,
        )  # fmt: skip


def encode(int8: Int8Range, k_1GSH: Tensor, v_1GSH: Tensor) -> Encoded:
    """`reference_encode` by a Triton kernel."""
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k_1GSH, v_1GSH))
    (_, G, S, HK), HV, device = k.shape, v.shape[3], k.device
    codes = tuple(torch.empty(1, G, S, H, dtype=torch.int8, device=device) for H in (HK, HV))
    steps = tuple(torch.empty(1, G, S, 1, dtype=STEP_TYPE, device=device) for _ in codes)
    seen = tuple(torch.empty(1, G, S, H, dtype=k.dtype, device=device) for H in (HK, HV))
    launch(
        _encode, (triton.cdiv(S, BLOCK), G),
        k, v, int8.key_shift, int8.key_step, int8.value_step, *codes, *steps, *seen,
        k.stride(1), k.stride(2), v.stride(1), v.stride(2), S, HK=HK, HV=HV,
        BLOCK_HK=triton.next_power_of_2(HK), BLOCK_HV=triton.next_power_of_2(HV), BLOCK_S=BLOCK,
        tiles=({"num_warps": 4},),
    )  # fmt: skip
    return Encoded((codes[0], codes[1]), (steps[0], steps[1]), (seen[0], seen[1]))
