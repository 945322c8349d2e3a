"""What a larger budget would give: KL on held-out rows over the tokens of one distillation, extrapolated.

`modlab.train` logs `eval_kl`, at the threshold for `keep_ratio` of the tokens seen lately, whatever its
target is by then. As long as the rates are at their peak it falls by a power of the tokens; the last part, in
which the rates fall, takes it down once more by what the noise of the steps had cost. A longer run with the
same recipe has both, so its end is this run's end, moved along the power law. One run, one
seed: a rough guide.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modlab.errors import ModlabError

AT_PEAK = 0.999
"""Rates of at least this share of the run's highest count as the peak."""

REACHED = 1.02
"""Below so many times `keep_ratio` the target has come by: before, the order of its keys is not learnt."""


@dataclass(frozen=True)
class Budget:
    """KL = kl · (tokens / at)^-power.

    Attributes:
        at: tokens of the run.
        kl: at its end, nats a token.
        power: of the tokens, by least squares over evaluations at the peak rate.
        stderr: of the power, 0 with too few evaluations to tell.
        points: how many evaluations.
    """

    at: float
    kl: float
    power: float
    stderr: float
    points: int

    def kl_after(self, tokens: float, errors: float = 0.0) -> float:
        """KL that a run of so many tokens would end at, with the power `errors` standard errors lower."""
        return float(self.kl * (tokens / self.at) ** -(self.power - errors * self.stderr))

    def tokens_for(self, kl: float) -> float:
        """Tokens after which the KL would be this; infinite where more of them change nothing."""
        if kl >= self.kl:
            return self.at
        return self.at * (self.kl / kl) ** (1 / self.power) if self.power > 0 else math.inf


def fit(log: Path, keep_ratio: float) -> Budget:
    """The power law of a run.

    Args:
        log: its log.jsonl, of a run with `eval_every` and held-out data.
        keep_ratio: that the run was asked for.

    Raises:
        ModlabError: fewer than three evaluations at the peak rate, once the target was at `keep_ratio`.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    evaluated = [row for row in rows if "eval_kl" in row]
    peak = max((row["lr"] for row in rows), default=0.0)
    steady = [row for row in evaluated if row["lr"] >= AT_PEAK * peak and _reached(row, keep_ratio)]
    if len(steady) < 3:
        raise ModlabError(
            f"{log}: {len(steady)} evaluation(s) at the peak rate with the target at keep_ratio="
            f"{keep_ratio:g}; three are needed: evaluate more often (eval_every)."
        )
    end = evaluated[-1]
    x = np.log([row["tokens"] for row in steady])
    y = np.log([row["eval_kl"] for row in steady])
    slope, cut = np.polyfit(x, y, 1)
    left = float(((y - slope * x - cut) ** 2).sum())
    spread = float(((x - x.mean()) ** 2).sum())
    stderr = math.sqrt(left / (len(x) - 2) / spread)
    return Budget(end["tokens"], end["eval_kl"], -float(slope), stderr, len(steady))


def _reached(row: dict[str, Any], keep_ratio: float) -> bool:
    return bool(row.get("target", 0.0) <= REACHED * keep_ratio)


def said(budget: Budget, tokens: list[float]) -> str:
    """A line for each number of tokens, with what it would be at a power one standard error less or more."""
    lines = [
        f"{budget.points} evaluations: KL falls by tokens^-{budget.power:.3f} ± {budget.stderr:.3f}; "
        f"{budget.at / 1e6:.1f} M tokens: {budget.kl:.4f}"
    ]
    for count in tokens:
        low, high = budget.kl_after(count, -1.0), budget.kl_after(count, 1.0)
        lines.append(f"{count / 1e6:.1f} M tokens: {budget.kl_after(count):.4f} ({low:.4f} to {high:.4f})")
    return "\n".join(lines)
