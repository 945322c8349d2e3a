"""One optimiser step over a global batch, however many forwards and processes it is cut into.

Losses are averaged over the tokens of the whole batch, and the routing objectives look at all of it: the
gradient is that of one forward over the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modlab.data.batches import IGNORE
from modlab.errors import ModlabError
from modlab.hf.arguments import forward_signature
from modlab.measure.evaluation import targets_of
from modlab.routing.noise import Noise
from modlab.routing.record import Recording
from modlab.routing.state import is_converted, record_routing
from modlab.training import objectives
from modlab.training.checks import check_length
from modlab.training.config import Objective, TrainConfig
from modlab.training.distillation import Distillation
from modlab.training.loader import Batch
from modlab.training.model import balancing_loss, forward, parameter_groups, real_of
from modlab.training.objectives import Sums
from modlab.training.processes import Processes
from modlab.training.schedule import is_what_if, keep_target, lr_factor
from modlab.training.sharding import is_part, shard, whole
from modlab.training.threshold_control import ThresholdControl
from modlab.training.zero import Zero

OF_THE_WHOLE = ("target", "budget", "load", "distil")
"""Objectives in which tokens' gradients depend on all the others."""

BARREN_STEPS = 8
"""So many first steps without a token to predict end a run."""


class Count(NamedTuple):
    """Tokens of a global batch, fp32 scalars: predicted, and not padding."""

    predicted: Tensor
    real: Tensor


class Step:
    """The model in training, its optimiser, and what becomes of a batch.

    Args:
        model: in train mode, on the device.
        config: the run's settings.
        objective: as `choose_objective` settled it.
        processes: among which each global batch is shared.
        teacher: for `config.kl`, or None.
    """

    def __init__(
        self, model: Any, config: TrainConfig, objective: Objective, processes: Processes, teacher: Any
    ) -> None:
        self.model, self.config, self.objective = model, config, objective
        self.processes, self.device, self.teacher = processes, processes.device, teacher
        self.routing: Any = model.mod if is_converted(model) else None
        self.layers: list[int] = list(self.routing.layers) if self.routing is not None else []
        self.wrapped: Any = model
        if processes.shards:
            for one in (model, teacher):
                if one is not None:
                    shard(one, processes, self._uses_bf16())
        self.adamw = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=config.lr,
            betas=config.betas,
            fused=self.device.type == "cuda",
        )
        self.zero = Zero(model, self.adamw, config, processes) if processes.zero else None
        if not processes.shards and not processes.zero:
            self.wrapped = processes.copied(model)
        self.distillation = (
            Distillation(model, config, self.layers, processes) if objective == "distil" else None
        )
        self.control = self.distillation.control if self.distillation is not None else None
        if objective == "budget":
            self.control = ThresholdControl(self.layers, config.per_layer, self.device)
        self.number = 0  # of the step that `begin` named
        self.target = config.keep_ratio  # asked for in it
        self.barren: int | None = 0  # steps so far without a token to predict; None once there was one

    def begin(self, step: int, share: float) -> None:
        """Sets what optimiser step `step` (from 0) is done with, `share` of the run being behind."""
        self.number = step
        if self.zero is not None:
            self.zero.begin()
        factor = lr_factor(self.config, step, share)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.target = keep_target(self.config, step, share)
        if self.routing is not None:
            self.routing.what_if = is_what_if(self.config.what_if, step)
        if self.control is not None and self.objective == "budget":
            self.routing.thresholds.update(self.control.thresholds(self.target))

    def backward(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Adds up the gradient of a global batch.

        Args:
            parts: this process's, on its device.

        Returns:
            this process's parts of loss, objective, kl, balance and keep_<layer>, scalars.
        """
        count = self._count(parts)
        whole = self._foresee(parts) if len(parts) > 1 and self.objective in OF_THE_WHOLE else None
        figures: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            self._give_noise(parts, number)
            with self._synchronised(last=number == len(parts) - 1):
                loss, own = self._loss(part, count, whole)
                # the average over processes is taken: of sums, it has to be the sum
                self.processes.accelerator.backward(loss * self.processes.world)
            figures = {name: figures.get(name, 0) + value for name, value in own.items()}
        return figures

    def update(self) -> Tensor:
        """Takes the optimiser's step; this process's part of the gradient's norm, scalar."""
        if self.zero is not None:  # the step was taken in the backward pass
            norm = self.zero.norm()
        else:
            trained = [p for group in self.adamw.param_groups for p in group["params"]]
            if self.processes.shards:
                self._average([p for p in trained if not is_part(p)])
            norm = whole(torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm))
            self.adamw.step()
        self.forget()
        if self.control is not None:
            self.control.advance(self.processes.sum)
        return norm.detach() / self.processes.world

    def forget(self) -> None:
        """No gradient is left, and nothing of the step's rows."""
        self.adamw.zero_grad(set_to_none=True)
        if self.distillation is not None:
            self.routing.row_shift = self.routing.row_recent = None

    @property
    def optimizer(self) -> torch.optim.Optimizer | Zero:
        """Whose state a checkpoint holds."""
        return self.zero or self.adamw

    def end(self) -> None:
        """Nothing of the training is left on the model."""
        if self.zero is not None:
            self.zero.end()

    def settle_thresholds(self) -> None:
        """The thresholds for `keep_ratio` as plain numbers, for all that comes between two steps."""
        if self.control is not None and self.objective == "budget":
            aim = self.target if self.config.keep_range is None else self.config.keep_ratio
            found = self.control.thresholds(aim)
            self.routing.thresholds.update({i: float(p) for i, p in found.items()})

    def to_device(self, batch: Batch) -> Batch:
        """The batch where the model is.

        Raises:
            ModlabError: its rows are too long; those of a stream are known only now.
        """
        check_length(self.model, batch["input_ids"].shape[1], "batches")
        if self.device.type == "cuda":
            return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
        return {k: v.to(self.device) for k, v in batch.items()}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast around a forward alone. Not accelerate's: that one replaces `model.forward`."""
        bf16 = self._uses_bf16()
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _uses_bf16(self) -> bool:
        wanted = self.config.mixed_precision
        return wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda")

    def _loss(self, part: Batch, count: Count, whole: Sums | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The part's share of the loss to minimise, and of the figures."""
        config = self.config
        if self.distillation is not None:
            return self._distilled(self.distillation, part, count, whole)
        with self.autocast(), self._recorded() as recording:
            output = forward(self.wrapped, part)
        logits = output.logits
        loss = objectives.next_token_loss(logits, targets_of(part), count.predicted)
        regulariser = divergence = balance = torch.zeros((), device=self.device)
        kept: dict[str, Tensor] = {}
        if recording is not None:
            step = recording.steps[-1]
            own = Sums.of(step)
            kept = {f"keep_{i}": k / count.real for i, k in zip(self.layers, own.kept, strict=True)}
            if self.control is not None:
                self.control.see(step, self.routing.config.keep_first)
            if whole is None:
                of_all = own.over(self.processes.sum) if self.objective in OF_THE_WHOLE else own
                whole = Sums(count.real, of_all.kept, of_all.gate)
            regulariser = objectives.routing_objective(self.objective, step, self.target, config, whole)
        if (own_balance := balancing_loss(self.model, output)) is not None:
            balance = own_balance * real_of(part).sum() / count.real  # each forward's own, by its tokens
        if config.kl:
            with torch.no_grad(), self.autocast():
                taught = forward(self.teacher, part).logits
            divergence = objectives.kl_to_teacher(logits, taught, real_of(part), count.real)
        figures = {"loss": loss, "objective": regulariser, "kl": divergence, "balance": balance}
        figures = {name: value.detach() for name, value in figures.items()} | kept
        return loss + regulariser + config.kl * divergence + balance, figures

    def _distilled(
        self, distillation: Distillation, part: Batch, count: Count, whole: Sums | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with objective="distil", whose figures are of the rows that the target is for."""
        noise = self.routing.noise
        distillation.begin_rows(part, noise, self.target, self.number)
        divergence, step, figures = distillation.loss(self.wrapped, part, noise, self.autocast, *count)
        pulled = distillation.pulled(step, noise)
        own = Sums.of(pulled)
        whole = own.over(self.processes.sum) if whole is None else whole
        regulariser = objectives.routing_objective("distil", pulled, self.target, self.config, whole)
        rows = whole.real.clamp(min=1)
        kept = {f"keep_{i}": k / rows for i, k in zip(self.layers, own.kept, strict=True)}
        nothing = torch.zeros((), device=self.device)
        figures = {"loss": figures["loss"], "kl": figures["kl"] / rows, "balance": nothing} | kept
        return divergence + regulariser, figures | {"objective": regulariser.detach()}

    def _count(self, parts: list[Batch]) -> Count:
        own = [torch.stack([(targets_of(p) != IGNORE).sum(), real_of(p).sum()]) for p in parts]
        found = self.processes.sum(torch.stack(own).sum(0))
        if self.barren is not None:
            self._check_predicts(bool(found[0] > 0))
        return Count(*found.float().clamp(min=1).unbind())

    def _check_predicts(self, predicts: bool) -> None:
        """Of a stream nothing but the first batch is known before, and that one may hold prompts alone."""
        if predicts:
            self.barren = None
            return
        self.barren = (self.barren or 0) + 1
        if self.barren >= min(BARREN_STEPS, self.config.steps or BARREN_STEPS):
            raise ModlabError(
                f"the batches of the first {self.barren} steps have no token to predict: all are padding "
                f"(attention_mask), or every label is {IGNORE}."
            )

    @torch.no_grad()
    def _foresee(self, parts: list[Batch]) -> Sums:
        """What the routers will do with all parts together: the parts' gradients depend on it.

        Each part takes a forward for that, with the noise that it will have.
        """
        seen = []
        model_class: Any = type(self.model)
        cuts = "logits_to_keep" in forward_signature(model_class).parameters
        short = {"logits_to_keep": 1} if cuts else {}  # nobody looks at the logits
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for number, part in enumerate(parts):
                self._give_noise(parts, number)
                if self.distillation is not None:
                    self.distillation.begin_rows(part, self.routing.noise, self.target, self.number)
                with self.autocast(), record_routing(self.model) as recording:
                    forward(self.model, part, **short)
                step = recording.steps[-1]
                if self.distillation is not None:
                    step = self.distillation.pulled(step, self.routing.noise)
                seen.append(Sums.of(step))
        return functools.reduce(operator.add, seen).over(self.processes.sum)

    def _give_noise(self, parts: list[Batch], number: int) -> None:
        """Each row of the global batch has its own, wherever it is trained: the parts of all processes lie
        one after another in it, those with the lower number first."""
        if self.routing is None:
            return
        world, rank = self.processes.world, self.processes.rank
        sizes = [len(part["input_ids"]) for part in parts]
        first = world * sum(sizes[:number]) + rank * sizes[number]
        rows = torch.arange(first, first + sizes[number], device=self.device)
        self.routing.noise = Noise(self.config.seed, self.number, rows)

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Recording | None]:
        if self.routing is None:
            yield None
            return
        with record_routing(self.model, detach=False) as recording:
            yield recording

    def _average(self, weights: list[torch.nn.Parameter]) -> None:
        """The gradients of weights that FSDP2 leaves whole, as DDP would: the average over processes, at
        once."""
        if not weights or self.processes.world == 1:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        summed = self.processes.sum(torch.cat([gradient.flatten() for gradient in own]))
        parts = (summed / self.processes.world).split([p.numel() for p in weights])
        for parameter, part in zip(weights, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are averaged over processes once, in the last part's backward pass."""
        if self.zero is not None:
            self.processes.accelerator.sync_gradients = last
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.processes.accelerator.no_sync(self.wrapped)
