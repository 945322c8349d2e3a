"""Keys in six bits and values in four: what `MoDConfig(kv_cache_dtype="k6v4")` stores, what attention sees.

A key or value of one KV head, H numbers, becomes H whole numbers, 0 to 63 or 0 to 15, and one step in half
precision; what is coded lies half-way between two of them, so that all of them are of use:

    key = shift_H + root_H * rotated(step * (codes_H - 31.5))
    value = rotated(step * (codes_H - 7.5))

The shift of each channel is that of `cache/range.py`, and `root` the square root of its step, a power of two
again. Both are rotated by a Hadamard matrix over the head before they are coded, in blocks of the largest
power of two that divides it: so few bits are too few for channels that stand out in one token, and rotation
spreads them (values alone: a KL of .006 with it, .053 without). Divided by their whole step, channels that
tell much of a key would be as rough as those that tell little; by none, large ones would fill the head; of
values the sum over tokens evens that out (docs/log.md). Rotation is linear and its own inverse: a kernel can
rotate the query instead of keys, and, instead of values, what attention has summed up.

Codes are packed plane by plane, so that a byte unpacks into channels that lie far apart and every plane into
a run of them:

    keys    H / 2 bytes: the lower four bits of channels i and i + H/2
            H / 4 bytes: the upper two of channels i, i + H/4, i + H/2 and i + 3H/4, the first lowest
    values  H / 2 bytes: channels i and i + H/2

Shape letters: G kv heads, S tokens, H head dim, C bytes of codes, P entries of a block of the rotation.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from modlab.cache.range import ALL_HEADS, LEAST_STEP, MOST_STEP, STEP_TYPE, KVRange
from modlab.errors import ModlabError

if TYPE_CHECKING:
    from modlab.config import KVCacheDtype

KEY_CODES, VALUE_CODES = 64, 16

LARGEST = 2.0**20
"""Of what is rotated, about: more ends here, so that no sum of them is infinite. A rotated number of a
value ends at some 15,000 already, as steps do (`MOST_STEP`)."""


class K6V4Range(KVRange):
    """Three bytes for four numbers of a key, one for two of a value."""

    kv_cache_dtype: ClassVar[KVCacheDtype] = "k6v4"
    code_type = torch.uint8

    @classmethod
    def widths(cls, key_dim: int, value_dim: int) -> tuple[int, int]:
        """Three quarters of a byte a number, and a half.

        Raises:
            ModlabError: keys that are not whole fours of numbers, or values that are not pairs.
        """
        if key_dim % 4 or value_dim % 2:
            raise ModlabError(
                f"kv_cache_dtype='k6v4' packs four numbers of a key and two of a value together, and heads "
                f"of {key_dim} and {value_dim} do not divide so: use 'int8'."
            )
        return key_dim * 3 // 4, value_dim // 2

    def encode_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (keys.float() - self.key_shift[:, None]) / self._key_root[:, None]
        codes, steps = _encode(_rotated(scaled.clamp_(-LARGEST, LARGEST)), KEY_CODES)
        return torch.cat([_packed(codes & 15, 4), _packed(codes >> 4, 2)], -1), steps

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        codes, steps = _encode(_rotated(values.float().clamp(-LARGEST, LARGEST)), VALUE_CODES)
        return _packed(codes, 4), steps

    def decode_keys(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        shift, root = self.key_shift[heads, None], self._key_root[heads, None]
        lower, upper = codes.split([root.shape[-1] // 2, root.shape[-1] // 4], -1)
        whole = _unpacked(upper, 2).bitwise_left_shift_(4).bitwise_or_(_unpacked(lower, 4))
        # halves of small whole numbers: their sums are exact, in whatever order and on whatever device
        rotated = _rotated(_centred(whole, KEY_CODES))
        return rotated.mul_(steps.float()).mul_(root).add_(shift).to(dtype)

    def decode_values(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        return _rotated(_centred(_unpacked(codes, 4), VALUE_CODES)).mul_(steps.float()).to(dtype)

    @property
    def _key_root(self) -> Tensor:
        return torch.exp2((self.key_step.log2() / 2).round())


def _encode(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes below `count`, uint8 of x's shape [..., H], not packed yet, and steps [..., 1]."""
    largest = (count - 1) / 2
    steps = (x.abs().amax(-1, keepdim=True) / largest).clamp(LEAST_STEP, MOST_STEP).to(STEP_TYPE)
    codes = (x / steps.float()).floor_().add_(count // 2).clamp_(0, count - 1).to(torch.uint8)
    return codes, steps


def _centred(codes: Tensor, count: int) -> Tensor:
    """What codes below `count` stand for, in steps, fp32."""
    return codes.float().sub_((count - 1) / 2)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., H] of so many bits each, in bytes [..., H * bits / 8]."""
    places = codes.unflatten(-1, (8 // bits, -1)) << _shifts(bits, codes.device)
    return places.sum(-2, dtype=torch.uint8)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """`_packed`, undone."""
    return (codes[..., None, :] >> _shifts(bits, codes.device)).bitwise_and_(2**bits - 1).flatten(-2)


@functools.cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where in a byte the codes of so many bits are, [8 / bits, 1]."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)[:, None]


def _rotated(x: Tensor) -> Tensor:
    """x [..., H] rotated by blocks, fp32; another rotation undoes it."""
    H = x.shape[-1]
    P = H & -H  # the largest power of two that divides it
    with torch.autocast(x.device.type, enabled=False):
        return (x.unflatten(-1, (-1, P)) @ _hadamard(P, x.device)).flatten(-2).mul_(P**-0.5)


@functools.cache
def _hadamard(P: int, device: torch.device) -> Tensor:
    """Sylvester's matrix of ones and minus ones, [P, P], P a power of two."""
    whole = torch.ones(1, 1, dtype=torch.float32, device=device)
    while len(whole) < P:
        whole = torch.cat([torch.cat([whole, whole], 1), torch.cat([whole, -whole], 1)])
    return whole
