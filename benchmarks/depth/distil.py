"""Distillation against the dense self: KL of every token, and what pulls the keep ratio.

Where the base is frozen that is `modlab.train` with objective="distil", whose teacher is the same model with
routing off (`by_package`). Where weights of the base train too, which it has no objective for, the teacher is
a copy of the dense model (`distil`). What was published without a teacher learns from the text, by
`modlab.train` again.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import modlab
from benchmarks.depth import removal
from benchmarks.depth.arms import PROJECTION_RATE, Arm
from benchmarks.depth.model import head, states
from benchmarks.real_models.mixture import Mixture
from modlab.execution.projections import PROJECTIONS
from modlab.routing.record import RoutingStep
from modlab.routing.router import is_router
from modlab.training.objectives import kl_to_teacher, target_objective

PULL = 4.0  # weight of the two-sided pull
RAMP = 0.3  # share of the run in which the target falls from 1
WARMUP = 0.05
EVERY = 60.0
"""Seconds between two times that a run hands out what it has come to."""

Kept = Callable[[dict[str, Any]], None]
"""Is called during a run with its facts so far: it may save the model as it is then."""


@dataclass(frozen=True)
class Plan:
    """How long and on what.

    Attributes:
        tokens: of the whole run.
        length: of a row.
        rows: of a forward.
        batch: tokens of a step.
        keep: keep ratio that "target" pulls to.
        seed: of rows and noise.
        rate: peak learning rate of trained projections.
    """

    tokens: int
    length: int = 4096
    rows: int = 2
    batch: int = 32_768
    keep: float = 1.0
    seed: int = 0
    rate: float = PROJECTION_RATE

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.batch))

    @property
    def rows_of_step(self) -> int:
        """Where a step is one forward."""
        return max(1, self.batch // self.length)

    @property
    def forwards(self) -> int:
        """Of a step."""
        return max(1, self.batch // (self.rows * self.length))


class _Handing:
    """A monitor of `modlab.train` that says each log line, and calls `kept` every `EVERY` seconds.

    Args:
        tokens: of a step.
        loss: what the curve is of, a name of log lines.
    """

    def __init__(self, kept: Kept, tokens: int, loss: str, say: Callable[[str], None]) -> None:
        self.kept, self.tokens, self.loss, self.say = kept, tokens, loss, say
        self.curve: list[tuple[int, float, float]] = []
        self.begun = self.last = time.monotonic()

    def step(self, step: int, share: float) -> bool:
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            self.kept(self.told(step * self.tokens, now - self.begun) | {"cut": True})
        return True

    def log(self, row: dict[str, Any]) -> None:
        kept = row.get("keep_ratio", 1.0)
        self.curve.append((row["tokens"], round(row[self.loss], 5), round(kept, 4)))
        speed = f"{row['tokens_per_s']:,.0f} a second"
        self.say(f"{row['tokens']:,} tokens {self.loss} {row[self.loss]:.4f} kept {kept:.3f} {speed}")

    def told(self, tokens: int, seconds: float) -> dict[str, Any]:
        """What a row tells of the run, with its curve of (tokens, loss, keep ratio)."""
        return {"tokens": tokens, "seconds": round(seconds, 1), "curve": list(self.curve)}


def by_package(
    model: Any,
    arm: Arm,
    mixture: Mixture,
    plan: Plan,
    say: Callable[[str], None],
    seconds: float | None,
    kept: Kept = lambda told: None,
) -> dict[str, Any]:
    """As `distil`, by the product itself: whole batches in one forward, logits in pieces. A published arm has
    its own training: all weights, the loss of the next token and the arm's term, skipped tokens not computed.

    Args:
        seconds: the run is that long, and its schedules follow the clock. `plan.tokens` are drawn before it
            all the same, and come again where they do not do; a published arm's rows as they are needed.
        kept: called every `EVERY` seconds.

    Returns:
        as of `distil`; the curve of a published arm is of the loss.
    """
    loss = "loss" if arm.published else "kl"
    batches: Iterable[dict[str, Tensor]] = _drawn(mixture, plan)
    if not arm.published:
        batches = list(itertools.islice(batches, plan.steps))
    config = modlab.TrainConfig(
        warmup=WARMUP, calibrate=False, batch_size=plan.rows_of_step, seed=plan.seed,
        log_every=max(1, plan.steps // 50),
        **({"max_minutes": seconds / 60} if seconds else {"steps": plan.steps}), **_objective(arm, plan),
    )  # fmt: skip
    watching = _Handing(kept, plan.rows_of_step * plan.length, loss, say)
    result = modlab.train(model, batches, config, monitor=watching)
    told = watching.told(result.tokens, result.seconds)
    speed = result.tokens / result.seconds
    say(f"{result.tokens:,} tokens, {speed:,.0f} a second, {loss} {told['curve'][-1][1]:.4f}")
    return told


def _objective(arm: Arm, plan: Plan) -> dict[str, Any]:
    """Settings of `modlab.TrainConfig` that say what the arm learns, and how fast."""
    if arm.published:
        return {
            "objective": {"load": "load", "topk": "bce"}[arm.pull], "alpha": arm.alpha, "what_if": 0.0,
            "lr": arm.base_rate, "router_lr": arm.rate,
        }  # fmt: skip
    settings = {"objective": "distil", "lr": plan.rate, "freeze_below": arm.above}
    if arm.pull == "target":
        settings |= {"keep_ratio": plan.keep, "ramp": 0.0 if arm.started else RAMP, "router_lr": arm.rate}
    return settings


def _drawn(mixture: Mixture, plan: Plan) -> Iterator[dict[str, Tensor]]:
    while True:
        yield {"input_ids": mixture.rows(plan.rows_of_step, plan.length)}


def trainable(model: Any, arm: Arm, rate: float = PROJECTION_RATE) -> list[dict[str, Any]]:
    """Parameter groups; what trains becomes fp32, all else is frozen. `rate` is that of projections."""
    added: list[Any] = []
    projections: list[Any] = []
    base: list[Any] = []
    for name, parameter in model.named_parameters():
        is_added = is_router(name)
        wanted = is_added or arm.trains == "all" or (arm.trains == "lora" and "lora_" in name)
        parameter.requires_grad_(wanted)
        if wanted:
            parameter.data = parameter.data.float()
            copied = f".{PROJECTIONS}." in name
            (projections if copied else added if is_added else base).append(parameter)
    groups = [
        {"params": added, "rate": arm.rate},
        {"params": projections, "rate": rate},
        {"params": base, "rate": arm.base_rate},
    ]
    return [group for group in groups if group["params"]]


def distil(
    model: Any,
    arm: Arm,
    mixture: Mixture,
    plan: Plan,
    say: Callable[[str], None],
    minutes: float | None = None,
) -> dict[str, Any]:
    """Trains in place, weights of the base too; the model ends in eval mode.

    Args:
        model: converted, or dense with parts removed.
        minutes: cuts the run.

    Returns:
        tokens, seconds and the curve of (tokens, kl, keep ratio).
    """
    device = next(model.parameters()).device
    teacher = _teacher(model)
    optimiser = torch.optim.AdamW(trainable(model, arm, plan.rate), betas=(0.9, 0.95), weight_decay=0.0)
    torch.manual_seed(plan.seed)
    model.train()
    began, curve = time.monotonic(), []
    for step in range(plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * _share(step, plan.steps)
        target = 1 - (1 - plan.keep) * min(1.0, (step + 1) / (RAMP * plan.steps))
        total, kept = 0.0, 1.0
        for _ in range(plan.forwards):
            ids = mixture.rows(plan.rows, plan.length).to(device)
            with torch.no_grad():
                told = states(teacher, ids) @ head(teacher).T
            with recorded(model, detach=False) as steps:
                said = _said(model, ids, told.dtype)
            kl = kl_to_teacher(said, told, torch.ones_like(ids).bool())
            loss = kl
            if steps:
                loss = loss + _pull(arm, steps[-1], target)
                kept = torch.stack([k.float().mean() for k in steps[-1].keep.values()]).mean().item()
            (loss / plan.forwards).backward()
            total += kl.item() / plan.forwards
        torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = (step + 1) * plan.forwards * plan.rows * plan.length
        curve.append((done, round(total, 5), round(kept, 4)))
        if step % max(1, plan.steps // 10) == 0 or step == plan.steps - 1:
            speed = done / (time.monotonic() - began)
            say(f"step {step + 1}/{plan.steps} KL {total:.4f} kept {kept:.3f} {speed:,.0f} tokens/s")
        if minutes and time.monotonic() - began > 60 * minutes:
            break
    model.eval()
    return {"tokens": curve[-1][0], "seconds": round(time.monotonic() - began, 1), "curve": curve}


def _share(step: int, steps: int) -> float:
    """Of the peak rate: a warm-up, then a cosine to a tenth."""
    warm = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _teacher(model: Any) -> Any:
    """A dense copy with today's weights."""
    other = copy.deepcopy(model)
    if modlab.is_converted(other):
        modlab.revert(other)
    removal.forget(other)
    return other.eval().requires_grad_(False)


@contextlib.contextmanager
def recorded(model: Any, detach: bool = True) -> Iterator[list[RoutingStep]]:
    """Inside this block every forward leaves a step, if the model is converted."""
    if not modlab.is_converted(model):
        yield []
        return
    with modlab.record_routing(model, detach) as recording:
        yield recording.steps


def _said(model: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of all tokens; weights that train are fp32, so autocast makes them what the base is."""
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        return states(model, ids) @ head(model).T


def _pull(arm: Arm, step: RoutingStep, target: float) -> Tensor | float:
    if arm.pull == "target":
        return target_objective(step, target, PULL)
    return 0.0
