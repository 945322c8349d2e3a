"""DeepSpeed's first stage (ZeRO-1), through accelerate: each process keeps a part of AdamW's state.

Weights and gradients are whole. The second and third stage are refused: they cut gradients up while a process
computes them, in the order in which they come, which is not the same everywhere where tokens skip. With the
second stage gradients were wrong then, without a word; the first one sums them afterwards, weight by weight.

The engine takes the optimiser's step inside the backward pass of a global batch's last part. Its own
checkpoints are pickles; a run's hold whole tensors, as everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError

if TYPE_CHECKING:
    from modlab.training.config import TrainConfig
    from modlab.training.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGE = 1


def check_settings(settings: dict[str, Any]) -> None:
    """Refuses what a run cannot follow.

    Args:
        settings: of DeepSpeed, as accelerate has put them together from flags and file.

    Raises:
        ModlabError: another stage, or something that `TrainConfig` has a setting for.
    """
    advice = (
        "Say --zero_stage 1, or shard with --use_fsdp --fsdp_version 2, which cuts weights and gradients."
    )
    zero = settings.get("zero_optimization", {})
    if (stage := zero.get("stage", 0)) in (2, 3):
        raise ModlabError(
            f"accelerate was launched with DeepSpeed's stage {stage}, which cuts gradients up in the order "
            "in which a process computes them; where tokens skip layers processes differ in it, and "
            f"gradients come out wrong. {advice}"
        )
    if stage != STAGE:
        raise ModlabError(
            f"accelerate was launched with DeepSpeed's stage {stage}, which shares nothing: launch with "
            f"--multi_gpu. {advice}"
        )
    for name, instead in (
        ("optimizer", "it is AdamW with the rates of TrainConfig"),
        ("scheduler", "rates are TrainConfig's lr, warmup and min_lr_ratio"),
    ):
        if name in settings:
            raise ModlabError(f"DeepSpeed's settings name a {name}: leave it out, {instead}.")
    for name in ("bf16", "fp16"):
        if settings.get(name, {}).get("enabled") is True:
            raise ModlabError(
                f"DeepSpeed's settings switch {name} on, which would make routers {name} as well: leave it "
                "out, TrainConfig.mixed_precision says what is computed in bf16."
            )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") not in ("none", None):
            raise ModlabError(
                f"DeepSpeed's settings have {name}, which was never tried here: leave it out, or shard with "
                "--use_fsdp --fsdp_version 2 --fsdp_offload_params true."
            )


def check_dtypes(model: nn.Module) -> None:
    """Refuses frozen weights that are not fp32; trained ones are.

    Raises:
        ModlabError: there are some.
    """
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            raise ModlabError(
                f"DeepSpeed takes models of one dtype, and {name}, which is frozen, is {weight.dtype}: "
                "launch with --multi_gpu (of routers or adapters alone there is hardly any optimiser's state "
                "to share), or load the model in float32."
            )


class Zero:
    """DeepSpeed's engine around a model in training and its optimiser.

    Args:
        model: on its device.
        adamw: whose parameters become this process's parts.
        config: the run's settings.
        processes: launched with DeepSpeed.

    Raises:
        ModlabError: DeepSpeed does not take the model.
    """

    def __init__(
        self, model: nn.Module, adamw: torch.optim.AdamW, config: TrainConfig, processes: Processes
    ) -> None:
        check_dtypes(model)
        self.adamw = adamw
        self.accelerator = processes.accelerator
        settings = self.accelerator.deepspeed_plugin.deepspeed_config
        settings |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": 1,  # the parts of a batch are weighed here
            "gradient_clipping": config.max_grad_norm,
        }
        settings["zero_optimization"]["overlap_comm"] = False  # else gradients are summed as they come
        self.trained = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        try:
            self.engine, _ = self.accelerator.prepare(model, adamw)
        except ValueError as error:
            raise ModlabError(f"DeepSpeed does not take this {type(model).__name__}: {error}") from error

    def begin(self) -> None:
        """The parts are the weights' again, whatever has changed these since the last step."""
        self.engine.optimizer.refresh_fp32_params()

    def norm(self) -> Tensor:
        """Of the last step's gradient, before it was clipped."""
        return torch.tensor(float(self.accelerator.clip_grad_norm_((), 0.0)), device=self.engine.device)

    def state(self) -> dict[str, Tensor]:
        """AdamW's, whole, as <name of the parameter>/<name of the state>; all processes take part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [state["step"] for state in self.adamw.state.values() if "step" in state]
        if not steps:
            return {}
        found = {}
        for name, parameter in self.trained.items():
            for kind in MOMENTS:
                found[f"{name}/{kind}"] = safe_get_full_optimizer_state(parameter, kind).cpu()
            found[f"{name}/step"] = steps[0].to("cpu", copy=True)
        return found

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes over what `state` gave, by name and kind; every process its part."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        step = next(iter(state.values()))["step"]
        for group in self.adamw.param_groups:
            for part in group["params"]:
                at = part.device if group["fused"] else torch.device("cpu")
                moments = {kind: torch.zeros_like(part) for kind in MOMENTS}
                self.adamw.state[part] = {"step": step.to(at, copy=True), **moments}
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, values in state.items():
            for kind in MOMENTS:
                parameter = self.trained[name]
                safe_set_full_optimizer_state(parameter, values[kind].to(parameter.device), kind)

    def end(self) -> None:
        """The model is the user's again: no hooks, no weights that lie in the engine's buffers."""
        self.engine.destroy()
        for parameter in self.trained.values():
            parameter.data = parameter.data.clone()
