"""Trainers of transformers, and those of TRL that build on them, train a converted model's routers.

    from modlab.integrations.trainer import MoDCallback

    Trainer(model, args, train_dataset=data, callbacks=[MoDCallback(keep_ratio=0.45)]).train()

While such a trainer trains, the model adds the routing objective to the loss it returns, as
mixture-of-experts models add theirs. The objectives, the ramp and the what-if passes are those of
`modlab.train`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerCallback

from modlab.data.batches import IGNORE
from modlab.errors import ModlabError
from modlab.routing.noise import Noise
from modlab.routing.record import Recording
from modlab.routing.router import is_router
from modlab.routing.state import is_converted, record_routing
from modlab.saving.files import ADAPTER_CONFIG, ROUTER_FILE
from modlab.saving.restore import load_routers
from modlab.saving.save_adapters import check_whole, describe_adapters
from modlab.training import objectives
from modlab.training.checks import choose_objective, nothing_to_learn
from modlab.training.config import Objective, TrainConfig
from modlab.training.objectives import Sums, routing_objective
from modlab.training.schedule import is_what_if, ramped_target
from modlab.warn import warn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from modlab.routing.record import RoutingStep
    from modlab.routing.state import Routing


class MoDCallback(TrainerCallback):
    """Makes a `Trainer` (also TRL's `SFTTrainer`, also around a PEFT model) train the routers.

    The trainer has to take the loss from the model's output; one that computes its own from the logits never
    sees the objective, and the callback refuses it at the end of the first step.

    Each log entry gains `keep_ratio` (share of tokens kept in routed layers) and `routing_objective`, both
    the mean since the entry before. Checkpoints carry the routers, and a resumed run loads them.

    Args:
        objective: "target" (two-sided keep ratio), "load" (the paper's), "bce" (top-k), "none", or "auto".
        keep_ratio: what "target" aims at: mean share of tokens kept in the routed layers, in (0, 1].
        lam: weight of the target term.
        per_layer: "target" pulls every layer to keep_ratio instead of their mean.
        alpha: weight of the load term.
        bce: weight of the top-k term.
        ramp: share of the run over which the target falls from 1 to keep_ratio.
        what_if: share of steps, evenly spread, in which routed layers run on all tokens.

    Raises:
        ModlabError: settings that cannot work; when training begins, a dense model.
    """

    def __init__(
        self,
        objective: Objective = "auto",
        keep_ratio: float = TrainConfig.keep_ratio,
        lam: float = TrainConfig.lam,
        per_layer: bool = TrainConfig.per_layer,
        alpha: float = TrainConfig.alpha,
        bce: float = TrainConfig.bce,
        ramp: float = TrainConfig.ramp,
        what_if: float = TrainConfig.what_if,
    ) -> None:
        self.config = TrainConfig(
            steps=1,  # the trainer's arguments say how long
            objective=objective,
            keep_ratio=keep_ratio,
            lam=lam,
            per_layer=per_layer,
            alpha=alpha,
            bce=bce,
            ramp=ramp,
            what_if=what_if,
        )
        self.config.check()
        if objective == "budget":
            raise ModlabError("objective='budget' moves thresholds at each step: train with modlab.train.")
        self.hooks: list[RemovableHandle] = []
        self.logged: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self.model = converted_model(model)
        self.routing: Routing = self.model.mod  # type: ignore[assignment]
        if self.model is not model and hasattr(self.model, "peft_config"):
            check_whole(self.model)  # before hours of training that could not be saved
        self.objective = choose_objective(self.config, self.model)
        learns = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.learning = any(is_router(name) for name in learns)
        self.routing.base_trained |= not all(is_router(name) or "lora_" in name for name in learns)
        if self.objective != "none" and not self.learning:
            raise ModlabError(
                "the routers are frozen: set requires_grad, or with PEFT take the LoraConfig from "
                "modlab.integrations.peft.lora_config(model)."
            )
        self.what_if_before = self.routing.what_if
        self.seed, self.world, self.rank = args.seed, args.world_size, args.process_index
        self.open = contextlib.ExitStack()
        self.recording: Recording | None = None
        self.target = 1.0
        self.logged = []
        self.longest: int | None = 0  # tokens a row, before the first log line
        self.added = False
        if state.global_step:
            self._forget_origin()
        if state.global_step and self.model is model:
            named = Path(args.resume_from_checkpoint or "", ROUTER_FILE)
            usual = _checkpoint(args, state) / ROUTER_FILE
            load_routers(self.model, named if named.is_file() else usual)
        self._remove_hooks()
        # On the outermost model: PEFT calls the forward inside it, past its hooks.
        self.hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._add_objective, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress = state.global_step / max(state.max_steps, 1)
        self.target = ramped_target(self.config.keep_ratio, progress, self.config.ramp)
        self.routing.what_if = is_what_if(self.config.what_if, state.global_step)
        self.step, self.rows = state.global_step, 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget_origin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.added:
            raise ModlabError(
                "this trainer did not ask the model for a loss (no labels among its inputs), so the routing "
                "objective is not in what it minimises: train with modlab.train, or with a trainer that uses "
                "the model's own loss."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.logged or logs is None or "loss" not in logs:
            return
        self._remark_on_short_rows()
        terms, kept = (torch.stack(column).mean().item() for column in zip(*self.logged, strict=True))
        figures = {"keep_ratio": kept, "routing_objective": terms}
        self.logged = []
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """To a PEFT checkpoint it is added how to convert the base, and the routers if PEFT left them out."""
        folder = _checkpoint(args, state)
        if (folder / ADAPTER_CONFIG).is_file():
            describe_adapters(self.model, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remark_on_short_rows()
        self._remove_hooks()
        self.routing.what_if, self.routing.noise = self.what_if_before, None
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best and self.model is kwargs["model"]:
            load_routers(self.model, Path(best, ROUTER_FILE))

    def _forget_origin(self) -> None:
        if self.learning:
            self.routing.forget_origin()

    def _remark_on_short_rows(self) -> None:
        """Once, of the rows before the first log line or the end."""
        reason = nothing_to_learn(self.model, self.longest) if self.longest else ""
        if reason and self.objective != "none":
            warn(f"so far the trainer has {reason}")
        self.longest = None

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self.routing.noise = self._noise(args, kwargs)
            self.recording = self.open.enter_context(record_routing(self.model, detach=False))

    def _add_objective(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.recording is None or getattr(output, "loss", None) is None:
            return output
        step = self.recording.steps[-1]
        if self.longest is not None:
            self.longest = max(self.longest, next(iter(step.gate.values())).shape[1])
        whole, share = self._whole(step, kwargs)
        term = routing_objective(self.objective, step, self.target, self.config, whole)
        if self.objective != "none" and not term.requires_grad:
            raise ModlabError(
                "the routers get no gradient, because gradient checkpointing is reentrant: set "
                "use_reentrant=False among its arguments."
            )
        self.added = True
        of_all = term.detach() * whole.real / step.real.sum().clamp(min=1)
        self.logged.append((of_all, objectives.keep_ratios(step, whole).mean()))
        output.loss = output.loss + term.to(output.loss.dtype) * share
        return output

    def _whole(self, step: RoutingStep, inputs: dict[str, Any]) -> tuple[Sums, Tensor | float]:
        """What the routers did in this forward of all processes, and the weight of this process's part of the
        objective in the loss that it returns.

        A trainer that accumulates gradients says how many tokens its optimiser step predicts, and the model's
        loss is divided by that: then a forward counts by its tokens. The trainer averages over processes,
        where the parts of the objective have to be added up.
        """
        sums = Sums.of(step)
        items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
        if items is None or labels is None:
            return sums.over(self._summed), float(self.world)
        predicted = (labels[:, 1:] != IGNORE).sum().to(sums.real)
        counts = torch.stack([predicted, torch.as_tensor(items).to(sums.real)])
        predicted, items = self._summed(counts).unbind()
        # Either each process knows the number of all, and the trainer multiplies the loss by the number of
        # processes; or each knows its own number, and it does not: both come to this.
        return sums.over(self._summed), predicted * self.world / items

    def _summed(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        return reduce(value, "sum") if self.world > 1 else value

    def _noise(self, args: Any, kwargs: dict[str, Any]) -> Noise | None:
        """Rows of an optimiser step lie one after another: first those of all processes' first forward."""
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        ids = next((value for value in given if isinstance(value, Tensor)), None)
        if ids is None:
            return None
        first = self.world * self.rows + self.rank * len(ids)
        self.rows += len(ids)
        return Noise(self.seed, self.step, torch.arange(first, first + len(ids), device=ids.device))

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open.close()
        self.recording = None

    def _remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def converted_model(model: nn.Module) -> PreTrainedModel:
    """The converted model itself, where `model` is or wraps one (PEFT, DDP, torch.compile).

    Raises:
        ModlabError: there is none.
    """
    found = next((m for m in model.modules() if "mod" in m.__dict__ and is_converted(m)), None)
    if found is None:
        raise ModlabError(f"this {type(model).__name__} is dense: call modlab.convert(model) first.")
    return found  # type: ignore[return-value]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "", f"checkpoint-{state.global_step}")
