"""The router: one gate a token, always in fp32.

Shape letters: B batch rows, T tokens in, D model dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUTER = "mod_router"
"""Name of the router inside each routed layer; the only parameters that conversion adds."""


def is_router(name: str) -> bool:
    """Whether this names a parameter of one of modlab's routers; mixtures of experts have their own."""
    return ".mod_" in name and "router." in name


def logit_of(gate: float) -> float:
    """The router logit of a gate, or of a threshold."""
    return math.log(gate / (1 - gate))


class Router(nn.Module):
    """Linear D -> 1 on the residual stream: logit = w·x + b, gate = sigmoid(logit) (MoDification eq. 1).

    Weights and arithmetic stay fp32 whatever the model's dtype or autocast: a bf16 gate has a step of 0.004
    near 0.5, enough to flip decisions between prefill and decode.
    """

    def __init__(self, hidden_size: int, init_gate: float, device: torch.device | None = None) -> None:
        super().__init__()
        # Zero weights: right after conversion every token has the same, open gate, so nothing is skipped.
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.full((1,), logit_of(init_gate), dtype=torch.float32, device=device))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Router logits, fp32 [B, T]; their sigmoid is the gate."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            return F.linear(x_BTD.float(), self.weight[None], self.bias).squeeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves with the model to another device, but stays fp32 under `model.to(torch.bfloat16)` and
        `.half()`.
        """

        def keep_fp32(t: Tensor) -> Tensor:
            moved = fn(t)
            return (
                t.to(device=moved.device) if moved.dtype != torch.float32 and t.is_floating_point() else moved
            )

        return super()._apply(keep_fp32, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.numel()}, dtype={self.weight.dtype}"
