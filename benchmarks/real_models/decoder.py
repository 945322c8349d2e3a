"""The base run with and without routing: layer by layer, compiled halves around the attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_models import attention
from benchmarks.real_models.base import Base, after, before
from benchmarks.real_models.gates import GateForm, Gates, gate_values, hard_log_weights, soft_log_weights

KeepRule = Callable[[int, Tensor], Tensor]
"""keep(layer, z [B, A, T]) -> bool [B, A, T]."""


@dataclass
class Routes:
    """What gates did in one pass.

    Attributes:
        soft: by layer, the mean of sigmoid(z) of each gate, [B, A], with gradient; in training.
        open: by layer, the share of z above 0, or kept, [B, A].
        kept_older: by layer, kept keys older than the window at the end of the row, [B, A]; hard passes.
    """

    soft: list[Tensor]
    open: list[Tensor]
    kept_older: list[Tensor]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on a GPU; a layer's weights are arguments, so one compilation serves all layers."""
    if not torch.cuda.is_available():
        return function
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def _soft_gate(
    x_BTD: Tensor, weights: Any, noise_BAT: Tensor, shift_B: Tensor, form: GateForm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = gate_values(x_BTD, weights, form.ahead) - shift_B[:, None, None]
    opened = (z > 0).float().mean(2)
    return soft_log_weights(z, noise_BAT, form), torch.sigmoid(z).mean(2), opened, z.detach()


def dense_hidden(base: Base, ids_BT: Tensor) -> Tensor:
    """Last states, normalised, [B, T, D]; routing off."""
    x = base.embed(ids_BT)
    cos, sin = base.rotation(ids_BT.shape[1])
    for layer in base.layers:
        read = attention.dense(*compiled(before)(x, layer, cos, sin, base.shape))
        x = compiled(after)(x, read, layer, base.shape.eps)
    return compiled(base_norm)(x, base.norm_D, base.shape.eps)


def base_norm(x_BTD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    from benchmarks.real_models.base import rms_norm

    return rms_norm(x_BTD, norm_D, eps)


def soft_hidden(
    base: Base, gates: Gates, ids_BT: Tensor, window: int, shift_B: Tensor | None = None,
    seen: list[Tensor] | None = None,
) -> tuple[Tensor, Routes]:  # fmt: skip
    """Last states of training, with gradients to the gates.

    Args:
        shift_B: the row's threshold; 0 if left out.
        seen: gets every layer's gate values [B, A, T].
    """
    x = base.embed(ids_BT)
    B, T = ids_BT.shape
    cos, sin = base.rotation(T)
    routes = Routes([], [], [])
    shift_B = torch.zeros(B, device=x.device) if shift_B is None else shift_B
    for i, layer in enumerate(base.layers):
        noise = torch.rand(B, gates.layer(i).A, T, device=x.device)
        weight, soft, opened, z = compiled(_soft_gate)(x, gates.of(i), noise, shift_B, gates.form)
        routes.soft.append(soft)
        routes.open.append(opened)
        if seen is not None:
            seen.append(z)
        q, k, v = compiled(before)(x, layer, cos, sin, base.shape)
        read = attention.attend(q, k, v, weight.expand(-1, base.shape.G, -1), window)
        x = compiled(after)(x, read, layer, base.shape.eps)
    return compiled(base_norm)(x, base.norm_D, base.shape.eps), routes


@torch.no_grad()
def hard_hidden(
    base: Base, gates: Gates, ids_BT: Tensor, window: int, keep: KeepRule | None = None,
    seen: list[Tensor] | None = None,
) -> tuple[Tensor, Routes]:  # fmt: skip
    """Last states with keys kept or gone, by the gates' threshold or another rule."""
    x = base.embed(ids_BT)
    T = ids_BT.shape[1]
    cos, sin = base.rotation(T)
    routes = Routes([], [], [])
    first = gates.form.first
    for i, layer in enumerate(base.layers):
        z = compiled(gate_values)(x, gates.of(i), gates.form.ahead)
        if seen is not None:
            seen.append(z)
        kept = z >= gates.threshold if keep is None else keep(i, z)
        routes.open.append(kept.float().mean(2))
        older = kept[:, :, first : max(first, T - window)].float().sum(-1)
        routes.kept_older.append(older + min(first, max(0, T - window)))
        weight = hard_log_weights(kept, gates.form).expand(-1, base.shape.G, -1)
        q, k, v = compiled(before)(x, layer, cos, sin, base.shape)
        x = compiled(after)(x, attention.attend(q, k, v, weight, window), layer, base.shape.eps)
    return compiled(base_norm)(x, base.norm_D, base.shape.eps), routes
