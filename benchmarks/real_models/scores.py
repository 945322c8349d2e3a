"""Gates without training: regress how much attention a key gets when its text is repeated.

Rows are [context, "repeat it", context]. The score of a key of the first copy, for a KV head: the largest
attention from the second copy, times the norm of its value behind the output projection, over the norm of
the state that reads it; its logarithm is what gates regress (KVzap, arXiv 2601.07891). Linear gates are
solved for in closed form, a hidden layer is fitted on what they leave. Forward passes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_models import attention
from benchmarks.real_models.base import Base, Layer, Shape, after, before
from benchmarks.real_models.decoder import compiled
from benchmarks.real_models.gates import Gates, gate_values
from modlab.routing.router import normalised
from modlab.training.regression import Explained

RIDGE = 1000.0
LEAST = -20.0  # log score below which keys are alike


@dataclass
class Fit:
    """Attributes:
    tokens: of first copies that were regressed on.
    seconds: all of it.
    r2_linear, r2: share of the variance within held-out rows that is explained.
    """

    tokens: int
    seconds: float
    r2_linear: float
    r2: float


def log_scores(
    x_BTD: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: Layer, shape: Shape, length: int
) -> Tensor:
    """[B, G, length] for the keys of the first copy; rows end with a second copy of `length` tokens."""
    T, heads = q.shape[1], shape.N // shape.G
    o_NHD = layer.o.view(shape.D, shape.N, shape.H).permute(1, 2, 0).float()
    gram_NHH = o_NHD @ o_NHD.transpose(-1, -2)
    reader = torch.arange(T - length, T, device=q.device)
    hidden = torch.arange(T, device=q.device) > reader[:, None]
    found = []
    for b in range(len(q)):
        keys = k[b].repeat_interleave(heads, 1).transpose(0, 1)
        s_NRT = (q[b, T - length :].transpose(0, 1) @ keys.transpose(-1, -2)).float() * shape.H**-0.5
        s_NRT = s_NRT.masked_fill(hidden, -torch.inf)
        read_by = x_BTD[b, T - length :].float().norm(dim=-1).log()
        share = s_NRT[:, :, :length] - (s_NRT.logsumexp(-1) + read_by)[:, :, None]
        value = v[b, :length].repeat_interleave(heads, 1).transpose(0, 1).float()
        size = ((value @ gram_NHH) * value).sum(-1).clamp(min=1e-12).sqrt().log()
        found.append((share.amax(1) + size).view(shape.G, heads, length).amax(1))
    return torch.stack(found).clamp(min=LEAST)


@torch.no_grad()
def fit(
    base: Base, gates: Gates, rows: list[Tensor], prompt: Tensor, batch: int = 4, steps: int = 400,
    say: Callable[[str], None] = print,
) -> Fit:  # fmt: skip
    """Fits `gates` in place on `rows` [length] of token ids; the last eighth of them is held out.

    Args:
        prompt: token ids that ask for the repetition.
        steps: of the hidden layer's fit.
    """
    begun = time.monotonic()
    shape, length, first = base.shape, len(rows[0]), gates.form.first
    L, D, A = shape.L, shape.D, gates.layer(0).A
    device = base.device
    held = max(1, len(rows) // 8 // batch * batch)
    xx = torch.zeros(L, D + 1, D + 1, dtype=torch.float64, device=device)
    xy = torch.zeros(L, D + 1, A, dtype=torch.float64, device=device)
    states: list[list[Tensor]] = [[] for _ in range(L)]
    targets: list[list[Tensor]] = [[] for _ in range(L)]
    for a in range(0, len(rows), batch):
        text = torch.stack(rows[a : a + batch]).to(device)
        ids = torch.cat([text, prompt.to(device).expand(len(text), -1), text], 1)
        x = base.embed(ids)
        cos, sin = base.rotation(ids.shape[1])
        for i, layer in enumerate(base.layers):
            q, k, v = compiled(before)(x, layer, cos, sin, shape)
            y_BGT = compiled(log_scores)(x, q, k, v, layer, shape, length)
            y_BAT = y_BGT if gates.form.per_head else y_BGT.amax(1, keepdim=True)
            seen = normalised(x[:, first:length])
            states[i].append(seen.to(x.dtype))
            targets[i].append(y_BAT[:, :, first:].transpose(1, 2))
            if a < len(rows) - held:
                flat = F.pad(seen.reshape(-1, D), (0, 1), value=1.0)
                xx[i] += (flat.T @ flat).double()
                xy[i] += (flat.T @ targets[i][-1].reshape(-1, A).float()).double()
            x = compiled(after)(x, attention.dense(q, k, v), layer, shape.eps)
    solution = torch.linalg.solve(
        xx + RIDGE * torch.eye(D + 1, dtype=torch.float64, device=device), xy
    ).float()
    for i in range(L):
        gates.layer(i).linear.copy_(solution[i, :D].T)
        gates.layer(i).bias.copy_(solution[i, D])
    x_LRTD = torch.stack([torch.cat(part) for part in states])
    y_LRTA = torch.stack([torch.cat(part) for part in targets])
    r2_linear = explained(gates, x_LRTD[:, -held:], y_LRTA[:, -held:])
    if gates.form.hidden:
        fit_hidden(gates, x_LRTD[:, :-held].flatten(1, 2), y_LRTA[:, :-held].flatten(1, 2), steps)
    r2 = explained(gates, x_LRTD[:, -held:], y_LRTA[:, -held:])
    result = Fit((len(rows) - held) * length, time.monotonic() - begun, r2_linear, r2)
    say(f"scores: {result}")
    return result


@torch.enable_grad()
def fit_hidden(gates: Gates, x_LSD: Tensor, y_LSA: Tensor, steps: int) -> None:
    """Adam on all of the gates' weights, every layer at once."""
    names = ("linear", "bias", "into_KD", "out_AK")
    stack = [
        torch.stack([getattr(layer, name).detach().float() for layer in gates.layers]).requires_grad_()
        for name in names
    ]
    linear, bias, into, out = stack
    optimizer = torch.optim.Adam(
        [{"params": [linear, bias], "lr": 1e-4}, {"params": [into, out], "lr": 2e-3}]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        picked = torch.randint(x_LSD.shape[1], (4096,), device=x_LSD.device)
        x = x_LSD[:, picked].float()
        z = x @ linear.transpose(1, 2) + bias[:, None]
        z = z + F.gelu(x @ into.transpose(1, 2)) @ out.transpose(1, 2)
        loss = (z - y_LSA[:, picked]).square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for name, values in zip(names, stack, strict=True):
            for layer, value in zip(gates.layers, values, strict=True):
                getattr(layer, name).copy_(value)


def explained(gates: Gates, x_LRTD: Tensor, y_LRTA: Tensor) -> float:
    """Share of the variance within rows that the gates explain, over all layers."""
    found = Explained()
    for i in range(len(x_LRTD)):
        found.add(gate_values(x_LRTD[i], (*gates.of(i)[:4], None)).transpose(1, 2), y_LRTA[i])
    return found.r2
