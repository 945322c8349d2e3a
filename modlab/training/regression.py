"""Routers fitted to log scores: linear gates in closed form, their hidden layer on what these leave.

Shape letters: S tokens, D model dim, A gates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.routing.router import HiddenRouter, Router, normalised

BATCH = 4096  # tokens of a step of the hidden layer's fit
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


@torch.enable_grad()
def fit_hidden(router: HiddenRouter, x_SD: Tensor, y_SA: Tensor, steps: int, seed: int) -> None:
    """Adam on all of a router's weights, from the solution of `Ridge`, to the least square error."""
    generator = torch.Generator(x_SD.device).manual_seed(seed)
    parts = {"linear": [router.weight, router.bias], "hidden": [router.into, router.out]}
    trained = {
        name: [p.detach().clone().requires_grad_() for p in parameters] for name, parameters in parts.items()
    }
    optimizer = torch.optim.Adam([{"params": trained[name], "lr": rate} for name, rate in RATES.items()])
    (weight, bias), (into, out) = trained["linear"], trained["hidden"]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / WARM) * (1 - step / steps)
        picked = torch.randint(len(x_SD), (BATCH,), device=x_SD.device, generator=generator)
        n = features(router, x_SD[picked])
        z = F.linear(n, weight.view(-1, n.shape[-1]), bias) + F.linear(F.gelu(F.linear(n, into)), out)
        loss = (z - y_SA[picked]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameters in parts.items():
            for parameter, found in zip(parameters, trained[name], strict=True):
                parameter.copy_(found)
