"""The router: one gate a token, always in fp32.

Shape letters: B rows, T tokens in, D model dim, G gates of a layer, U units of a hidden layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from modlab.config import MoDConfig

ROUTER = "mod_router"
"""Name of the router inside each routed layer; the only parameters that conversion adds."""


def is_router(name: str) -> bool:
    """Whether this names a parameter that conversion added: of a router, or a skip's own. Mixtures of experts
    have routers too, which are the base's."""
    return ".mod_" in name


def make_router(config: MoDConfig, hidden_size: int, gates: int, device: torch.device | None) -> Router:
    """The router of one layer, as the settings want it.

    Args:
        hidden_size: D.
        gates: G.
    """
    if config.router_hidden:
        return HiddenRouter(hidden_size, config.init_gate, config.router_hidden, device=device, gates=gates)
    return Router(hidden_size, config.init_gate, device=device, gates=gates)


def logit_of(gate: float) -> float:
    """The router logit of a gate, or of a threshold; of the threshold 0, which every gate reaches, -inf."""
    return math.log(gate / (1 - gate)) if gate else -math.inf


class Router(nn.Module):
    """Linear D -> G on the residual stream: logit = w·x + b, gate = sigmoid(logit) (MoDification eq. 1).

    Weights and arithmetic stay fp32 whatever the model's dtype or autocast: a bf16 gate has a step of 0.004
    near 0.5, enough to flip decisions between prefill and decode.

    Args:
        hidden_size: D.
        init_gate: gate of every token right after conversion, in (0, 1).
        device: where the weights are made.
        gates: G. One gate has weights [D] and logits [B, T]; several have [G, D] and [B, T, G].
    """

    def __init__(
        self, hidden_size: int, init_gate: float, device: torch.device | None = None, gates: int = 1
    ) -> None:
        super().__init__()
        shape = (hidden_size,) if gates == 1 else (gates, hidden_size)
        # Zero weights: right after conversion every token has the same, open gate, so nothing is skipped.
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        bias = torch.full((gates,), logit_of(init_gate), dtype=torch.float32, device=device)
        self.bias = nn.Parameter(bias)

    @property
    def in_kernels(self) -> bool:
        """Whether fast generation's kernels can read it. A subclass that computes its logits in another way
        says False."""
        return True

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Router logits, fp32 [B, T] or [B, T, G]; their sigmoid is the gate."""
        single = self.weight.dim() == 1
        with torch.autocast(x_BTD.device.type, enabled=False):
            logit = F.linear(x_BTD.float(), self.weight[None] if single else self.weight, self.bias)
            return logit.squeeze(-1) if single else logit

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves with the model to another device, but stays fp32 under `model.to(torch.bfloat16)`."""

        def keep_fp32(t: Tensor) -> Tensor:
            moved = fn(t)
            return (
                t.to(device=moved.device) if moved.dtype != torch.float32 and t.is_floating_point() else moved
            )

        return super()._apply(keep_fp32, recurse)

    def extra_repr(self) -> str:
        gates = self.bias.numel()
        return f"in_features={self.weight.shape[-1]}, gates={gates}, dtype={self.weight.dtype}"


class HiddenRouter(Router):
    """Linear plus a hidden layer, on the normalised residual stream n: w·n + b + out·gelu(into·n).

    n is the state over its root mean square, so that a logit says the same of tokens whose states are larger.
    All gates of the layer share the hidden units. Right after conversion `out` is zero: every gate is open.

    Args:
        hidden: U, at least 1.
        hidden_size, init_gate, device, gates: as of `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        init_gate: float,
        hidden: int,
        device: torch.device | None = None,
        gates: int = 1,
    ) -> None:
        super().__init__(hidden_size, init_gate, device, gates)
        # From a generator of its own: conversion leaves the caller's random numbers alone.
        into_UD = torch.randn(hidden, hidden_size, generator=torch.Generator().manual_seed(0))
        self.into = nn.Parameter((into_UD * hidden_size**-0.5).to(device))
        self.out = nn.Parameter(torch.zeros(gates, hidden, device=device))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Router logits, fp32 [B, T] or [B, T, G]."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            n_BTD = normalised(x_BTD)
            more = F.linear(F.gelu(F.linear(n_BTD, self.into)), self.out)
            return super().forward(n_BTD) + (more.squeeze(-1) if self.weight.dim() == 1 else more)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden={len(self.into)}"


def normalised(x: Tensor) -> Tensor:
    """Root mean square 1 over the last dimension, fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
