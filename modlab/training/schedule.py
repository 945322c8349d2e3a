"""What a step and the finished share of a run decide: learning rate, keep ratio asked for, what-if steps."""

from __future__ import annotations

import math

from modlab.routing.recent_tokens import RATIOS
from modlab.training.config import TrainConfig

GOLDEN = (math.sqrt(5) - 1) / 2


def lr_factor(config: TrainConfig, step: int, progress: float) -> float:
    """Share of the peak learning rate in optimiser step `step` (from 0), `progress` in [0, 1] of the run."""
    if config.warmup >= 1:
        warm = (step + 1) / config.warmup
    elif config.warmup > 0:  # a first step at rate 0 would be wasted
        warm = max(progress, 1e-3) / config.warmup
    else:
        warm = 1.0
    falling = 0.0
    if config.cooldown > 0:
        falling = max(0.0, min(progress, 1.0) - (1 - config.cooldown)) / config.cooldown
    cosine = 0.5 * (1 + math.cos(math.pi * falling))
    return min(1.0, warm) * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def keep_target(config: TrainConfig, step: int, progress: float) -> float:
    """The keep ratio asked for in optimiser step `step` (from 0), `progress` in [0, 1] of the run: 1 during
    the hold, then falling to `keep_ratio` over the ramp. With a `keep_range`, `keep_ratio` is replaced by a
    value of it that follows from the step alone (multiples of the golden ratio, which fill it evenly); with
    objective="distil" by its lower end.
    """
    aim = config.keep_ratio
    if config.objective == "distil":
        lowest = aim if config.keep_range is None else config.keep_range[0]
        return ratio_target(lowest, progress - config.hold, config.ramp)
    if config.keep_range is not None:
        low, high = config.keep_range
        aim = low + (high - low) * ((step + 1) * GOLDEN % 1.0)
    return ramped_target(aim, progress - config.hold, config.ramp)


def ramped_target(target: float, progress: float, ramp: float) -> float:
    """The keep ratio asked for at `progress` in [0, 1] of the run: from 1 (everything) to `target` over
    `ramp`; 1 before the run's part that counts (a negative `progress`).

    A target that falls at once shuts gates before the model has learnt which tokens need them.
    """
    if progress < 0:
        return 1.0
    if ramp <= 0 or progress >= ramp:
        return target
    return 1.0 + (target - 1.0) * progress / ramp


def ratio_target(aim: float, progress: float, ramp: float) -> float:
    """As `ramped_target`, but it is the ratio 1 / share that grows evenly, from 1 to 1 / `aim`."""
    if progress < 0:
        return 1.0
    done = 1.0 if ramp <= 0 else min(1.0, progress / ramp)
    return 1 / (1 + (1 / aim - 1) * done)


def step_saving(step: int) -> float:
    """The saving that optimiser step `step` (from 0) has its recent tokens from: each as often, evenly
    spread."""
    return RATIOS[int((step + 1) * GOLDEN % 1.0 * len(RATIOS))]


def is_what_if(share: float, step: int) -> bool:
    """Whether step `step` (from 0) is one of the evenly spread `share` of what-if steps; the first one always
    is, unless the share is 0."""
    return math.ceil((step + 1) * share - 1e-9) > math.ceil(step * share - 1e-9)
