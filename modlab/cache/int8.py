"""Keys and values in eight bits: what `MoDConfig(kv_cache_dtype="int8")` stores, and what attention sees.

A key or value of one KV head, H numbers, becomes H whole numbers from -127 to 127 and one step in half
precision:

    key = shift_H + step_H * step * codes_H        value = step_H * step * codes_H

Shift and step of each channel are the layer's own and fixed: some channels of keys are a hundred times as
large as others and hardly vary (biases of the projection do that in Qwen 2.5), and next to them the others
would be lost. Channels' steps are powers of two, so that they can be moved from keys to the query, and from
values to the output, without rounding.

Attention sees stored numbers and nothing else, from the token's own on: `encode` is the one place where
something is rounded, and `decode` what everybody reads.

Shape letters: G kv heads, S tokens, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RANGE = "mod_int8_range"
"""Name of the `Int8Range` inside each routed layer."""

LARGEST_CODE = 127

ALL_HEADS = slice(None)

STEP_TYPE = torch.float16

LEAST_STEP = 2.0**-14
"""The smallest normal number of that type: a key of zeros has it."""

MOST_STEP = 2047.0
"""Times 32, as a kernel takes it, still a number of that type: what is larger ends at its largest code."""

PEAK = 3.0
"""Largest over usual size of a channel that varies as random numbers do, about. Where it varies less, as a
wave does, its peaks say what has to fit: by its usual size it would have half as many codes (docs/log.md)."""


class Int8Range(nn.Module):
    """What keys and values of one layer are measured against, fp32 whatever the model's type.

    Attributes:
        key_shift: the middle of each channel of keys, [G, HK].
        key_step, value_step: about a third of the largest of what is left, and the usual size of values,
            powers of two, [G, HK] and [G, HV].
    """

    key_shift: Tensor
    key_step: Tensor
    value_step: Tensor

    def __init__(self, heads: int, key_dim: int, value_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("key_shift", torch.zeros(heads, key_dim, device=device))
        self.register_buffer("key_step", torch.ones(heads, key_dim, device=device))
        self.register_buffer("value_step", torch.ones(heads, value_dim, device=device))

    @torch.no_grad()
    def measure(self, keys: Tensor, values: Tensor) -> None:
        """Takes over the range of these keys and values [B, G, S, H], at positions from all over the context:
        rotation turns what was the middle of a channel into a wave, whose peaks are no larger than they are.
        """
        wide = keys.float()
        low, high = wide.amin((0, 2)), wide.amax((0, 2))
        self.key_shift.copy_((low + high) / 2)
        self.key_step.copy_(_power_of_two((high - low) / (2 * PEAK)))
        self.value_step.copy_(_power_of_two(values.float().square().mean((0, 2)).sqrt()))

    def encode_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys [..., G, S, HK] what is stored: codes, int8 of that shape, and steps [..., G, S, 1]."""
        return _encode((keys.float() - self.key_shift[:, None]) / self.key_step[:, None])

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of values [..., G, S, HV], likewise."""
        return _encode(values.float() / self.value_step[:, None])

    def decode_keys(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        """Keys [..., G, S, HK] as attention sees them; of some `heads` alone, if those are given."""
        shift, step = self.key_shift[heads, None], self.key_step[heads, None]
        return codes.float().mul_(steps.float()).mul_(step).add_(shift).to(dtype)

    def decode_values(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        """Values [..., G, S, HV], likewise."""
        return codes.float().mul_(steps.float()).mul_(self.value_step[heads, None]).to(dtype)

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., G, S, H] as attention would see them from a cache."""
        return (
            self.decode_keys(*self.encode_keys(keys), keys.dtype),
            self.decode_values(*self.encode_values(values), values.dtype),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Range:
        """Moves with the model to another device, but stays fp32 under `model.to(torch.bfloat16)`."""

        def keep_fp32(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(device=moved.device)

        return super()._apply(keep_fp32, recurse)


def int8_range_of(layer: nn.Module) -> Int8Range | None:
    """What a routed layer's keys and values are measured against; None where it stores the model's type."""
    return getattr(layer, RANGE, None)


def token_bytes(heads: int, key_dim: int, value_dim: int) -> int:
    """Bytes of one token's codes and steps in one layer; those of its numbers alone are a byte each."""
    return heads * (key_dim + value_dim) + 2 * heads * STEP_TYPE.itemsize


def _encode(x: Tensor) -> tuple[Tensor, Tensor]:
    steps = (x.abs().amax(-1, keepdim=True) / LARGEST_CODE).clamp(LEAST_STEP, MOST_STEP).to(STEP_TYPE)
    codes = (x / steps.float()).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return codes, steps


def _power_of_two(x: Tensor) -> Tensor:
    return torch.exp2(x.clamp(min=2.0**-20).log2().round())
