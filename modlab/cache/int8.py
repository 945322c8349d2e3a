"""Keys and values in eight bits: what `MoDConfig(kv_cache_dtype="int8")` stores, and what attention sees.

A key or value of one KV head, H numbers, becomes H whole numbers from -127 to 127 and one step in half
precision:

    key = shift_H + step_H * step * codes_H        value = step_H * step * codes_H

Shift and step of each channel are those of `cache/range.py`.

Shape letters: G kv heads, S tokens, H head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from modlab.cache.range import ALL_HEADS, LEAST_STEP, MOST_STEP, STEP_TYPE, KVRange

if TYPE_CHECKING:
    from modlab.config import KVCacheDtype

LARGEST_CODE = 127


class Int8Range(KVRange):
    """A byte a number, keys and values alike: codes, int8, have the numbers' shape."""

    kv_cache_dtype: ClassVar[KVCacheDtype] = "int8"
    code_type = torch.int8
    in_kernels = True

    @classmethod
    def widths(cls, key_dim: int, value_dim: int) -> tuple[int, int]:
        """A byte a number."""
        return key_dim, value_dim

    def encode_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        return _encode((keys.float() - self.key_shift[:, None]) / self.key_step[:, None])

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return _encode(values.float() / self.value_step[:, None])

    def decode_keys(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        shift, step = self.key_shift[heads, None], self.key_step[heads, None]
        return codes.float().mul_(steps.float()).mul_(step).add_(shift).to(dtype)

    def decode_values(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        return codes.float().mul_(steps.float()).mul_(self.value_step[heads, None]).to(dtype)


def _encode(x: Tensor) -> tuple[Tensor, Tensor]:
    steps = (x.abs().amax(-1, keepdim=True) / LARGEST_CODE).clamp(LEAST_STEP, MOST_STEP).to(STEP_TYPE)
    codes = (x / steps.float()).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return codes, steps
