"""Distillation of gates: the same weights with routing off teach the routed pass; the base stays frozen.

Three objectives. `anneal`: KL plus a pull towards a target share of open gates, which falls from 1 to
1/ratio over most of the run (DMS, arXiv 2506.05345). `spread`: every row of a batch draws its own ratio, and
its threshold is put where the expected share is that ratio's, so no pull is needed and one set of gates
learns all ratios at once. `mixed`: half of the rows as in `anneal`, the others with thresholds for smaller
ratios, so that the order of the keys that the pull has closed stays learnt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_models.base import Base
from benchmarks.real_models.decoder import dense_hidden, soft_hidden
from benchmarks.real_models.divergence import kl_with_slope
from benchmarks.real_models.gates import Gates
from benchmarks.real_models.mixture import Mixture


@dataclass(frozen=True)
class Plan:
    """How a run goes.

    Attributes:
        tokens: of the whole run.
        batch: tokens of a step.
        length: of most rows.
        long: length of the other rows, `long_share` of the steps.
        objective: "anneal", "spread" or "mixed".
        ratio: the largest ratio aimed at.
        anneal: share of the run after which it is reached.
        pull: weight of the distance to the target share, a tenth of it once below the target.
        start: share of open gates to begin with.
        gain: what fitted gates are multiplied by at the start, against the noise.
    """

    tokens: int
    batch: int = 32_768
    length: int = 4096
    long: int = 8192
    long_share: float = 0.5
    objective: str = "anneal"
    ratio: float = 16.0
    anneal: float = 0.7
    pull: float = 2.0
    start: float = 0.9
    gain: float = 1.0
    window: int = 128
    rate: float = 1e-2
    seed: int = 0


def distil(
    base: Base, gates: Gates, mixture: Mixture, plan: Plan, say: Callable[[str], None] = print,
    minutes: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains `gates` in place; returns tokens, tokens a second (after the first steps) and the history.

    Args:
        minutes: the run's schedule is cut to what fits, going by the speed of its first steps.
    """
    torch.manual_seed(plan.seed)
    steps = max(1, plan.tokens // plan.batch)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)
    curve = _begin(base, gates, mixture, plan)
    history: list[dict[str, float]] = []
    begun = time.monotonic()
    timed, timed_step = begun, 0
    average: dict[str, float] = {}
    step = 0
    while step < steps:
        if step == 6:
            _wait(base)
            timed, timed_step = time.monotonic(), 6
        if step == 16 and minutes is not None:
            _wait(base)
            each = (time.monotonic() - timed) / 10
            steps = max(20, min(steps, int((60 * minutes - (time.monotonic() - begun)) / each) + step))
            say(f"{steps} steps fit")
        length = plan.long if step % 4 < round(4 * plan.long_share) else plan.length
        ids = mixture.rows(max(1, plan.batch // length), length).to(base.device)
        progress = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, (step + 1) / 10) * min(1.0, 0.05 + 0.95 * (1 - progress) / 0.3)
        facts = _step(base, gates, ids, plan, progress, curve)
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % max(1, steps // 40) == 0 or step == steps:
            average = {name: round(float(value), 5) for name, value in facts.items()}
            speed = (step - timed_step) * plan.batch / (time.monotonic() - timed)
            history.append({"step": step, "speed": round(speed), **average})
            say(f"step {step}/{steps} {average} {speed:,.0f} tokens/s")
    _wait(base)
    speed = (steps - timed_step) * plan.batch / (time.monotonic() - timed)
    return {
        "tokens": steps * plan.batch, "steps": steps, "tokens_per_second": round(speed),
        "seconds": round(time.monotonic() - begun, 1), "history": history,
    }  # fmt: skip


class Curve:
    """Gate values seen lately, and the threshold at which the expected open share is what is asked."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def shifts(self, share_B: Tensor) -> Tensor:
        """Thresholds [B] such that the mean of sigmoid(z - threshold) is `share_B`."""
        low = torch.full_like(share_B, -60.0)
        high = torch.full_like(share_B, 60.0)
        for _ in range(30):
            middle = (low + high) / 2
            share = torch.sigmoid(self.values[:, None] - middle).mean(0)
            low, high = torch.where(share > share_B, middle, low), torch.where(share > share_B, high, middle)
        return (low + high) / 2


def sample(seen: list[Tensor], most: int = 65_536) -> Tensor:
    """Some of all layers' gate values."""
    flat = torch.cat([z.flatten()[:: max(1, len(seen) * z.numel() // most)] for z in seen])
    return flat.float()


def _begin(base: Base, gates: Gates, mixture: Mixture, plan: Plan) -> Curve:
    """Shifts the gates so that `plan.start` of them are open."""
    ids = mixture.rows(max(1, plan.batch // plan.length), plan.length).to(base.device)
    seen: list[Tensor] = []
    gates.scale(plan.gain)
    with torch.no_grad():
        soft_hidden(base, gates, ids, plan.window, torch.full((len(ids),), -60.0, device=base.device), seen)
    curve = Curve(sample(seen) - 60.0)  # the values seen have the shift taken off
    by = curve.values.quantile(1 - plan.start).item()
    if gates.layer(0).linear.abs().sum() > 0:  # fresh gates are all alike: their bias is the start
        gates.shift(-by)
        curve.values = curve.values - by
    return curve


def _step(
    base: Base, gates: Gates, ids: Tensor, plan: Plan, progress: float, curve: Curve
) -> dict[str, Tensor | float]:
    B = len(ids)
    seen: list[Tensor] = []
    shift_B, share_B = _thresholds(B, plan, progress, curve)
    with torch.no_grad():
        teacher = dense_hidden(base, ids)
    student, routes = soft_hidden(base, gates, ids, plan.window, shift_B, seen)
    kl, slope = kl_with_slope(student.detach(), teacher, base.head_VD, share_B)
    pulled = shift_B == 0
    opened, soft = (torch.stack(part).mean((0, 2)) for part in (routes.open, routes.soft))
    facts: dict[str, Tensor | float] = {"kl": kl.mean(), "open": opened.mean()}
    loss = (student.float() * slope.float()).sum()
    if plan.objective != "anneal":
        curve.values = sample([z + shift_B[:, None, None] for z in seen])
    if plan.objective != "spread":
        target = 1 / _ratio(plan, progress)
        kept = (opened + soft - soft.detach())[pulled].mean()
        above, below = (kept - target).clamp(min=0), (target - kept).clamp(min=0)
        loss = loss + plan.pull * above + 0.1 * plan.pull * below
        facts |= {"kl": kl[pulled].mean(), "open": opened[pulled].mean(), "target": target}
        if plan.objective == "mixed":
            facts["kl_other"] = kl[~pulled].mean()
    loss.backward()
    return facts


def _ratio(plan: Plan, progress: float) -> float:
    """The ratio aimed at, 1 at first."""
    return 1 + (plan.ratio - 1) * min(1.0, progress / plan.anneal)


def _thresholds(B: int, plan: Plan, progress: float, curve: Curve) -> tuple[Tensor, Tensor]:
    """Each row's threshold, 0 where the pull sets the ratio, and its share of the loss."""
    device = curve.values.device
    shift_B, share_B = torch.zeros(B, device=device), torch.full((B,), 1 / B, device=device)
    if plan.objective == "anneal":
        return shift_B, share_B
    free = B if plan.objective == "spread" else B // 2
    top = max(2.0, _ratio(plan, progress))
    at = (torch.arange(free, device=device) + torch.rand(free, device=device)) / free
    ratio = torch.exp(math.log(1.5) + at * (math.log(top) - math.log(1.5)))
    shift_B[:free] = curve.shifts(1 / ratio)
    if plan.objective == "spread":
        share_B = ratio**-0.75 / (ratio**-0.75).sum()
    return shift_B, share_B


def _wait(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize()
