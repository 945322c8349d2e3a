"""What stores keys and values in fewer bits than the model's own type: the base of every such way.

A `KVRange` is what keys and values of one layer are measured against, and how they are coded: `encode_keys`
and `encode_values` are the one place where something is rounded, `decode_keys` and `decode_values` what
everybody reads. What is measured is the same whatever the bits are, so that one way can take another's place.

Shift and step of each channel are the layer's own and fixed: some channels of keys are a hundred times as
large as others and hardly vary (biases of the projection do that in Qwen 2.5), and next to them the others
would be lost. Channels' steps are powers of two, so that they can be moved from keys to the query, and from
values to the output, without rounding. What is left of a key or value of one KV head gets a step of its own.

A subclass a way: `cache/int8.py`, `cache/k6v4.py`; `cache/dtypes.py` finds it by its name.

Shape letters: G kv heads, S tokens, H head dim, C bytes of the codes of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from modlab.config import KVCacheDtype


RANGE = "mod_int8_range"
"""Name of the `KVRange` inside each routed layer, whatever its bits: that of saved files since the first."""

ALL_HEADS = slice(None)

STEP_TYPE = torch.float16

LEAST_STEP = 2.0**-14
"""The smallest normal number of that type: a key of zeros has it."""

MOST_STEP = 2047.0
"""Times 32, as a kernel takes it, still a number of that type: what is larger ends at its largest code."""

PEAK = 3.0
"""Largest over usual size of a channel that varies as random numbers do, about. Where it varies less, as a
wave does, its peaks say what has to fit: by its usual size it would have half as many codes (docs/log.md)."""


class KVRange(nn.Module):
    """What keys and values of one layer are measured against, fp32 whatever the model's type.

    Args:
        heads: G.
        key_dim, value_dim: H of keys and of values.

    Attributes:
        key_shift: the middle of each channel of keys, [G, HK].
        key_step, value_step: about a third of the largest of what is left, and the usual size of values,
            powers of two, [G, HK] and [G, HV].

    Raises:
        ModlabError: heads of these sizes cannot be coded so (`widths`).
    """

    kv_cache_dtype: ClassVar[KVCacheDtype]
    code_type: ClassVar[torch.dtype]
    """Of codes, a byte each."""
    in_kernels: ClassVar[bool] = False
    """Whether fast generation has kernels for it."""

    key_shift: Tensor
    key_step: Tensor
    value_step: Tensor

    def __init__(self, heads: int, key_dim: int, value_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.widths(key_dim, value_dim)
        kind: Any = {"dtype": torch.float32, "device": device}  # whatever the default type is
        self.register_buffer("key_shift", torch.zeros(heads, key_dim, **kind))
        self.register_buffer("key_step", torch.ones(heads, key_dim, **kind))
        self.register_buffer("value_step", torch.ones(heads, value_dim, **kind))

    @classmethod
    def widths(cls, key_dim: int, value_dim: int) -> tuple[int, int]:
        """Bytes that the codes of a key and of a value of one head take.

        Raises:
            ModlabError: such heads cannot be coded so.
        """
        raise NotImplementedError

    @classmethod
    def token_bytes(cls, heads: int, key_dim: int, value_dim: int) -> int:
        """Bytes of one token's codes and steps in one layer."""
        return heads * (sum(cls.widths(key_dim, value_dim)) + 2 * STEP_TYPE.itemsize)

    @classmethod
    def measured_by(cls, other: KVRange) -> Self:
        """One with what another has measured."""
        heads, key_dim, value_dim = other.sizes
        found = cls(heads, key_dim, value_dim, other.key_shift.device)
        found.load_state_dict(other.state_dict())
        return found.train(other.training)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, and the numbers of a key and of a value of each."""
        return *self.key_step.shape, self.value_step.shape[-1]  # type: ignore[return-value]

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
        """Of keys [..., G, S, HK] what is stored: codes [..., G, S, C] and steps [..., G, S, 1]."""
        raise NotImplementedError

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of values [..., G, S, HV], likewise."""
        raise NotImplementedError

    def decode_keys(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        """Keys [..., G, S, HK] as attention sees them; of some `heads` alone, if those are given."""
        raise NotImplementedError

    def decode_values(
        self, codes: Tensor, steps: Tensor, dtype: torch.dtype, heads: slice = ALL_HEADS
    ) -> Tensor:
        """Values [..., G, S, HV], likewise."""
        raise NotImplementedError

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., G, S, H] as attention would see them from a cache."""
        return (
            self.decode_keys(*self.encode_keys(keys), keys.dtype),
            self.decode_values(*self.encode_values(values), values.dtype),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model to another device, but stays fp32 under `model.to(torch.bfloat16)`."""

        def keep_fp32(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(device=moved.device)

        return super()._apply(keep_fp32, recurse)


def range_of(layer: nn.Module) -> KVRange | None:
    """What a routed layer's keys and values are measured against; None where it stores the model's type."""
    return getattr(layer, RANGE, None)


def _power_of_two(x: Tensor) -> Tensor:
    return torch.exp2(x.clamp(min=2.0**-20).log2().round())
