"""Routers fitted to log scores: linear gates in closed form, their hidden layer on what these leave.

Shape letters: L layers, S tokens, D model dim, A gates, U units of a hidden layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.routing.router import HiddenRouter, Router, normalised

BATCH = 4096  # tokens of a step of the hidden layers' fit
TOGETHER = 2**26  # numbers in the states of such a step: so many layers at once, at least one
ASIDE, LOOK = 8, 25  # one sampled token in so many is set aside, and looked at after so many steps
WARM = 20  # steps until its full learning rate
RATES = {"linear": 1e-4, "hidden": 2e-3}


def features(router: Router, x: Tensor) -> Tensor:
    """What the router's linear part reads of hidden states [..., D], fp32."""
    return normalised(x) if isinstance(router, HiddenRouter) else x.float()


def linear_logits(router: Router, x: Tensor) -> Tensor:
    """Logits of the linear part alone, fp32 [..., A]."""
    return F.linear(features(router, x), router.weight.view(-1, x.shape[-1]), router.bias)


def logits(router: Router, x: Tensor) -> Tensor:
    """The router's logits, fp32 [..., A]."""
    found = router(x)
    return found[..., None] if router.weight.dim() == 1 else found


class Ridge:
    """Normal equations of one layer's gates, summed over tokens in fp64.

    Args:
        router: whose linear part is solved for, in place.
        ridge: what is added to the diagonal, in tokens whose features have mean square 1.
    """

    def __init__(self, router: Router, ridge: float) -> None:
        self.router, self.ridge = router, ridge
        D, A, device = router.weight.shape[-1], router.bias.numel(), router.bias.device
        kind = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        self.xx = torch.zeros(D + 1, D + 1, dtype=kind, device=device)
        self.xy = torch.zeros(D + 1, A, dtype=kind, device=device)

    def add(self, x_SD: Tensor, y_SA: Tensor) -> None:
        """Hidden states and their log scores."""
        flat = F.pad(features(self.router, x_SD), (0, 1), value=1.0)
        self.xx += flat.T @ flat
        self.xy += flat.T @ y_SA

    @torch.no_grad()
    def solve(self) -> None:
        """Gives the linear part its weights; the hidden layer adds nothing from here on."""
        D = len(self.xx) - 1
        tokens = self.xx[-1, -1].clamp(min=1)
        scale = self.xx.diagonal()[:D].sum() / (tokens * D)  # mean square of the features
        diagonal = torch.full_like(self.xx[0], self.ridge) * scale.clamp(min=1e-12)
        diagonal[-1] = 0.0  # log scores are far from 0: the bias is not held back
        solution = torch.linalg.solve(self.xx + diagonal.diag(), self.xy).float()
        self.router.weight.copy_(solution[:D].T.reshape(self.router.weight.shape))
        self.router.bias.copy_(solution[D])
        if isinstance(self.router, HiddenRouter):
            self.router.out.zero_()


class Explained:
    """Share of the variance within rows that logits explain, over all that was added."""

    def __init__(self) -> None:
        self.missed = self.spread = 0.0

    def add(self, z_BSA: Tensor, y_BSA: Tensor) -> None:
        """Logits and log scores of some rows of one layer."""
        self.missed += float((z_BSA - y_BSA).square().mean())
        self.spread += float(y_BSA.var(1, unbiased=False).mean())

    @property
    def r2(self) -> float:
        """1 for all of it, 0 for none; NaN before anything was added."""
        return 1 - self.missed / self.spread if self.spread else float("nan")


Sample = tuple[HiddenRouter, Tensor, Tensor]
"""A router with hidden states [S, D] and their log scores [S, A]."""


def fit_hidden(samples: list[Sample], steps: int, seed: int) -> None:
    """Adam on all of the routers' weights, from the solutions of `Ridge`, to the least square error.

    Takes the samples out of the list, and lets go of those of layers that are fitted at once when they are
    copied into one tensor.

    Layers of one shape are fitted at once: one alone is so little to do for a GPU that it would wait for
    launches. Each layer keeps the weights that did best on tokens that are set aside; where
    tokens are few for so many weights, those are early ones, or the linear solution that they began with.
    """
    alike: dict[tuple[Any, ...], list[Sample]] = {}
    while samples:
        sample = samples.pop(0)
        alike.setdefault(_shape(*sample), []).append(sample)
        del sample
    for group in alike.values():
        size = max(1, TOGETHER // (BATCH * group[0][1].shape[1]))
        while group:
            part, group[:size] = group[:size], []
            _fit_layers(part, steps, seed)


def _shape(router: HiddenRouter, x_SD: Tensor, y_SA: Tensor) -> tuple[Any, ...]:
    return x_SD.device, x_SD.shape, y_SA.shape, router.into.shape


@torch.enable_grad()
def _fit_layers(samples: list[Sample], steps: int, seed: int) -> None:
    """Empties the list once its samples are stacked."""
    S, D = samples[0][1].shape
    aside = min(S // ASIDE, BATCH)
    if not aside:
        return
    routers = tuple(router for router, _, _ in samples)
    x_LSD, y_LSA = torch.stack([x for _, x, _ in samples]), torch.stack([y for _, _, y in samples])
    samples.clear()
    layers = _Layers(routers, D)
    optimizer = torch.optim.Adam(layers.groups())
    generator = torch.Generator(x_LSD.device).manual_seed(seed)
    best, least_L = layers.copy(), layers.errors(x_LSD[:, -aside:], y_LSA[:, -aside:]).detach()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / WARM) * (1 - step / steps)
        picked = torch.randint(S - aside, (BATCH,), device=x_LSD.device, generator=generator)
        optimizer.zero_grad()
        layers.errors(x_LSD[:, picked], y_LSA[:, picked]).sum().backward()
        optimizer.step()
        if (step + 1) % LOOK == 0 or step == steps - 1:
            with torch.no_grad():
                error_L = layers.errors(x_LSD[:, -aside:], y_LSA[:, -aside:])
                layers.keep_better(best, error_L < least_L)
                least_L = torch.minimum(error_L, least_L)
    layers.give(best)


class _Layers:
    """The weights of several routers of one shape, first dimension L, to be trained."""

    def __init__(self, routers: tuple[HiddenRouter, ...], D: int) -> None:
        self.routers = routers
        parts = [[r.weight.view(-1, D), r.bias, r.into, r.out] for r in routers]
        self.weights = [
            torch.stack([p.detach() for p in part]).requires_grad_() for part in zip(*parts, strict=True)
        ]

    def groups(self) -> list[dict[str, Any]]:
        """For the optimizer: linear parts, hidden layers."""
        rates = RATES.values()
        return [
            {"params": w, "lr": r} for w, r in zip((self.weights[:2], self.weights[2:]), rates, strict=True)
        ]

    def errors(self, x_LSD: Tensor, y_LSA: Tensor) -> Tensor:
        """Mean square error of each layer, [L]."""
        weight_LAD, bias_LA, into_LUD, out_LAU = self.weights
        n_LSD = normalised(x_LSD)
        hidden_LSU = F.gelu(n_LSD @ into_LUD.mT)
        z_LSA = n_LSD @ weight_LAD.mT + bias_LA[:, None] + hidden_LSU @ out_LAU.mT
        return (z_LSA - y_LSA).square().mean((1, 2))

    def copy(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.weights]

    def keep_better(self, best: list[Tensor], better_L: Tensor) -> None:
        """Writes the present weights of these layers into `best`."""
        for kept, weight in zip(best, self.weights, strict=True):
            kept.copy_(torch.where(better_L.view(-1, *[1] * (weight.dim() - 1)), weight, kept))

    @torch.no_grad()
    def give(self, best: list[Tensor]) -> None:
        """Gives them to the routers."""
        for router, *found in zip(self.routers, *best, strict=True):
            for own, weight in zip((router.weight, router.bias, router.into, router.out), found, strict=True):
                own.copy_(weight.view(own.shape))
