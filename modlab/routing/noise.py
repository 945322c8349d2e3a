"""The noise of what-if passes, which follows from seed, step, row, token and layer alone.

So every row of a step's global batch has noise of its own, and it is the same whether the row is one of a
large batch or is trained in another process, in another forward or with other padding.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROW, TOKEN, GATE = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xA24BAED4963EE407  # odd: no two rows, tokens meet
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64 (Steele et al. 2014)


@dataclass(frozen=True)
class Noise:
    """What the draws of one forward follow from.

    Attributes:
        seed: of the run.
        step: the optimiser step.
        rows: index of each row in the step's global batch, long [B].
    """

    seed: int
    step: int
    rows: Tensor

    def uniform(self, layer_idx: int, real_BT: Tensor, gates: int = 1) -> Tensor:
        """One draw a token and gate, in (0, 1), fp32 [B, T, gates]; padding counts no token."""
        key = 0
        for part in (self.seed, self.step, layer_idx):
            key = _mixed(key ^ (part + 1) * ROW)
        rows_B1 = self.rows.to(real_BT.device)[:, None] * _signed(ROW)
        x = rows_B1 + real_BT.long().cumsum(1) * _signed(TOKEN) + _signed(key)
        x = x[..., None] + torch.arange(gates, device=x.device) * _signed(GATE)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            x = (x ^ _shifted(x, shift)) * _signed(factor)  # int64 wraps around
        return (_shifted(x, 41).float() + 0.5) / 2**23


def _mixed(value: int) -> int:
    """splitmix64 of a Python number."""
    value %= 2**64
    for shift, factor in ((30, FIRST), (27, SECOND)):
        value = (value ^ value >> shift) * factor % 2**64
    return value ^ value >> 31


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift of the bits of an int64, which torch gives the sign of the number."""
    return (x >> by) & (2 ** (64 - by) - 1)
