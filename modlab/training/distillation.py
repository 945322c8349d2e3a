"""objective="distil": a converted model learns to say what its dense self says, with the same weights.

Two passes over a batch. The teacher is the model with routing off (and adapters off, if there are any); the
student has it on. Both end in hidden states, which one head reads in pieces (`divergence.py`): no second
model and no logits of a whole row are ever in memory.

With a `keep_range` the target falls to its lower end, and of each two rows one has a threshold of its own, so
that it keeps some other share of the range: the order among keys that the target has closed stays learnt, and
one set of routers serves all ratios. Without, the target falls to `keep_ratio` (as in DMS, arXiv 2506.05345).

Shape letters: B rows, T tokens, S tokens in one line, D model dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.data.batches import IGNORE
from modlab.hf.model import eval_mode
from modlab.measure.evaluation import targets_of
from modlab.routing.noise import Noise
from modlab.routing.recent_tokens import recent_at
from modlab.routing.record import RoutingStep, kept_share
from modlab.routing.router import logit_of
from modlab.routing.state import record_routing, routing_off, thresholds_restored
from modlab.training.calibration import keep_with_recent, saving_for_keep, saving_text
from modlab.training.config import TrainConfig
from modlab.training.divergence import divergence
from modlab.training.head import Head
from modlab.training.loader import Batch
from modlab.training.model import forward, real_of
from modlab.training.processes import Processes
from modlab.training.schedule import GOLDEN, step_saving
from modlab.training.threshold_control import ThresholdControl

LEAST_RATIO = 2.0
"""Rows with thresholds of their own reach at least this far while the target is still higher."""

DRAW = -1  # of Noise, where layers count from 0


class Distillation:
    """The two passes and their loss.

    Args:
        model: converted, on its device, maybe a PEFT model around one.
        config: the run's settings.
        layers: routed layers, ascending.
        processes: among which each global batch is shared.
    """

    def __init__(self, model: Any, config: TrainConfig, layers: list[int], processes: Processes) -> None:
        self.model, self.config, self.routing = model, config, model.mod
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = Head(self.base)
        self.control = (
            ThresholdControl(layers, False, processes.device) if config.keep_range is not None else None
        )
        self.weight_B: Tensor | None = None  # of the rows that have begun; None: all alike

    @torch.no_grad()
    def prime(
        self,
        batches: list[Batch],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        summed: Callable[[Tensor], Tensor],
    ) -> None:
        """A fresh run's first rows have thresholds too: from what the gates say of these batches."""
        if self.control is None:
            return
        for batch in batches:
            batch = {name: value.to(self.control.counts_RZ.device) for name, value in batch.items()}
            with eval_mode(self.model), autocast(), record_routing(self.model) as recording:
                forward(self.model, batch, **self.head.short)
            self._see(recording.steps[-1])
        self.control.advance(summed)

    def begin_rows(self, part: Batch, noise: Noise, target: float, step: int) -> None:
        """Gives rows of the next forward their thresholds: 0 for those that the target is for. With recent
        tokens by saving, the others are near the step's saving, within twice and half of it. They count as
        `row_weight` says."""
        self.routing.row_shift = self.weight_B = None
        if self.control is None or self.config.keep_range is None:
            return
        rows_B = noise.rows
        first = Noise(noise.seed, noise.step, torch.zeros_like(rows_B[:1]))
        drawn = first.uniform(DRAW, torch.ones_like(rows_B[:1])[:, None].bool())[0, 0, 0]
        drawn_B = (drawn + rows_B // 2 * GOLDEN) % 1  # a step's rows lie apart, however few they are
        mildest = 1 / self.config.keep_range[1]
        furthest = end = max(LEAST_RATIO, 1 / target, mildest)
        if self.config.recent_range is not None:
            near, length = step_saving(step), part["input_ids"].shape[1]
            most = self.routing.most_recent
            self.routing.row_recent = recent_at(self.config.recent_range, near, length, most)
            mildest, furthest = (min(max(bound, mildest), furthest) for bound in (near / 2, near * 2))
        ratio_B = mildest * (furthest / mildest) ** drawn_B
        shift_B = self.control.expected(1 / ratio_B)
        self.routing.row_shift = torch.where(self._is_free(rows_B), shift_B, 0.0)
        if self.config.row_weight:
            weight_B = (end / ratio_B) ** self.config.row_weight
            self.weight_B = torch.where(self._is_free(rows_B), weight_B, 1.0)

    def pulled(self, step: RoutingStep, noise: Noise) -> RoutingStep:
        """The step as the rows see it that the target is for: the others are padding in it."""
        if self.control is None:
            return step
        return dataclasses.replace(step, real=step.real & ~self._is_free(noise.rows)[:, None])

    def loss(
        self,
        wrapped: Any,
        part: Batch,
        noise: Noise,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        predicted: Tensor,
        real: Tensor,
    ) -> tuple[Tensor, RoutingStep, dict[str, Tensor]]:
        """KL of a part of the global batch, whose rows have their thresholds (`begin_rows`).

        Args:
            wrapped: the model as it is trained, for the student's pass.
            noise: of these rows.
            predicted, real: tokens of the whole batch, scalars.

        Returns:
            the part's share of the mean KL, with gradient; what its routers did; the part's sums of the
            figures: `loss` over `predicted`, `kl` (not yet divided) over the rows that the target is for.
        """
        taught_BTD = self._dense(part, autocast)
        with autocast(), record_routing(self.model, detach=False) as recording, self.head.noting():
            output = forward(wrapped, part, **self.head.short)
            self.head.check(output.logits)
        step = recording.steps[-1]
        self._see(step)
        real_BT = real_of(part)
        line = _in_line(real_BT if "attention_mask" in part else None)
        targets_BT = F.pad(targets_of(part), (0, 1), value=IGNORE)
        weight_BT = real_BT.float() / real
        if self.weight_B is not None:
            weight_BT = weight_BT * self.weight_B[:, None]
        student_BTD = self.head.states
        with autocast():
            total, kl_S, loss_S = divergence(
                self.head, line(student_BTD), line(taught_BTD), line(weight_BT), line(targets_BT)
            )
        counted = self.pulled(step, noise).real
        figures = {
            "loss": loss_S.sum() / predicted,
            "kl": (kl_S * line(counted.float())).sum(),
        }
        return total, step, figures

    @torch.no_grad()
    def held_out(
        self,
        batches: Iterable[Batch],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        settled: bool = False,
    ) -> dict[str, float]:
        """How far the model is from its dense self where it keeps `keep_ratio`, whatever the target is now:
        what runs of different lengths can be compared by. All processes read all batches.

        Args:
            batches: held-out ones.
            settled: at the model's own thresholds, instead of those for `keep_ratio` of the tokens seen
                lately.

        Returns:
            eval_kl, nats a token, and eval_kl_keep, the share of tokens kept.
        """
        total = tokens = kept = 0.0
        with thresholds_restored(self.base):
            if self.control is not None and not settled:
                found = self.control.thresholds(self._keep_ratio())
                own = self.routing.thresholds
                own.update({i: _moved(own[i], by=float(p)) for i, p in found.items()})
            for batch in batches:
                batch = {name: value.to(self.head.model.device) for name, value in batch.items()}
                real_BT = real_of(batch)
                line = _in_line(real_BT if "attention_mask" in batch else None)
                taught_SD = line(self._dense(batch, autocast))
                with eval_mode(self.model), autocast(), record_routing(self.model) as recording:
                    with self.head.noting():
                        forward(self.model, batch, **self.head.short)
                    student_SD = line(self.head.states)
                    weight_S = torch.ones(len(student_SD), device=student_SD.device)
                    nothing_S = torch.full_like(weight_S, IGNORE, dtype=torch.long)
                    kl, _, _ = divergence(self.head, student_SD, taught_SD, weight_S, nothing_S)
                step = recording.steps[-1]
                kept += float(sum(kept_share(keep).sum() for keep in step.keep.values())) / len(step.keep)
                total, tokens = total + float(kl), tokens + float(step.real.sum())
        return {"eval_kl": total / tokens, "eval_kl_keep": kept / tokens}

    def _keep_ratio(self) -> float:
        """What the run will end at: `keep_ratio`, or, with recent tokens by saving, what those leave of it.
        Sets the latter."""
        config = self.config
        if config.recent_range is None:
            return config.keep_ratio
        saving = saving_for_keep(self.base, config.keep_ratio)
        context = saving_text(self.base, 1)
        keep_ratio = keep_with_recent(self.base, config.recent_range, saving, context)
        return max(keep_ratio, min(config.keep_range or (0.0,)))

    def _see(self, step: RoutingStep) -> None:
        if self.control is not None:
            offsets = {i: logit_of(p) for i, p in self.routing.thresholds.items()}
            self.control.see(step, self.routing.config.keep_first, offsets)

    @torch.no_grad()
    def _dense(self, part: Batch, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> Tensor:
        """Hidden states of the dense model [B, T, D]."""
        off = getattr(self.model, "disable_adapter", contextlib.nullcontext)
        with eval_mode(self.model), routing_off(self.base), off(), autocast(), self.head.noting():
            forward(self.model, part, **self.head.short)  # the outermost one: FSDP2 gathers its ends there
        return self.head.states

    def _is_free(self, rows_B: Tensor) -> Tensor:
        return rows_B % 2 == 1


def _in_line(real_BT: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What lays the real tokens of all rows [B, T, ...] one after another. Where they are told apart the host
    waits, once, for their number; None: all of them are real, and nothing is copied."""
    if real_BT is None:
        return lambda value: value.flatten(0, 1)
    at_S = real_BT.flatten().nonzero()[:, 0]
    return lambda value: value.flatten(0, 1)[at_S.to(value.device)]


def _moved(p: float, by: float) -> float:
    """A threshold, with that of `by` counted from it on."""
    return 1 / (1 + math.exp(-logit_of(p) - logit_of(by)))
