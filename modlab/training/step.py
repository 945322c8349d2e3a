"""What training and evaluation do with a model: logits, labels, recording, parameter groups, loss."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.routing.router import is_router
from modlab.routing.state import RoutingStep, is_converted, record_routing
from modlab.training import objectives
from modlab.training.config import Objective, TrainConfig
from modlab.training.loader import Batch, open_batches


@torch.no_grad()
def evaluate(
    model: Any,
    data: Any,
    max_batches: int = 0,
    batch_size: int = 8,
    accelerator: Any = None,
    autocast: Any = None,
    forward: Any = None,
) -> dict[str, float]:
    """Held-out loss as a decoding model would see it (eval mode: thresholds, nothing that looks ahead).

    Args:
        model: dense or converted; left in the mode it was in.
        data: as `batches` of `train`.
        max_batches: 0 for all.
        batch_size: rows a batch where `data` is a data set of rows.
        accelerator, autocast, forward: what `train` hands over from its own set-up.

    Returns:
        loss (nats a token), tokens, and for a converted model keep_ratio (mean over routed layers) and
        keep_<layer>.
    """
    source = open_batches(data, "eval_data")
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if source.kind == "rows":
        batch_size = max(1, min(batch_size, len(source.data) // world))
    device = next(model.parameters()).device
    layers = model.mod.layers if is_converted(model) else []
    sums = torch.zeros(
        2 + len(layers), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device
    )
    was_training = model.training
    model.eval()
    try:
        stream = source.iterate(batch_size, seed=None, rank=rank, world=world, epochs=1, drop_last=False)
        for i, batch in enumerate(stream):
            if max_batches and i * world >= max_batches:
                break
            batch = {k: v.to(device) for k, v in batch.items()}
            with (
                autocast() if autocast else contextlib.nullcontext(),
                recording_of(model, detach=True) as recording,
            ):
                logits = forward_logits(forward or model, batch)
            labels = labels_of(batch)
            count = (labels[:, 1:] != objectives.IGNORE).sum()
            sums[0] += objectives.next_token_loss(logits, labels) * count
            sums[1] += count
            if recording is not None:
                sums[2:] += objectives.keep_ratios(recording.steps[-1]) * count
    finally:
        model.train(was_training)
    if accelerator is not None:
        sums = accelerator.reduce(sums, "sum")
    total, count, *kept = sums.tolist()
    if not count:
        raise ModlabError("eval_data has nothing to predict (rows of one token, or every label -100).")
    result = {"loss": total / count, "tokens": int(count)}
    if layers:
        shares = [k / count for k in kept]
        result["keep_ratio"] = sum(shares) / len(shares)
        result |= {f"keep_{layer}": share for layer, share in zip(layers, shares, strict=True)}
    return result


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices with weight decay, vectors without, routers with a rate of their
    own."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": [], "router": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "router" if is_router(name) else "matrix" if parameter.dim() > 1 else "vector"
            groups[kind].append(parameter)
    if not any(groups.values()):
        raise ModlabError("No parameter of the model requires a gradient: there is nothing to train.")
    router_lr = config.lr if config.router_lr is None else config.router_lr
    return [
        {
            "params": parameters,
            "peak_lr": router_lr if kind == "router" else config.lr,
            "weight_decay": config.weight_decay if kind == "matrix" else 0.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


def forward_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [B, T, V] without a cache."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return model(**inputs, use_cache=False).logits


def labels_of(batch: Batch) -> Tensor:
    """Labels [B, T]: the batch's own, else its input ids, -100 where attention_mask is 0."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, objectives.IGNORE)
    return batch["input_ids"]


def routing_objective(objective: Objective, step: RoutingStep, target: float, config: TrainConfig) -> Tensor:
    """The term that trains the routers, scalar fp32; 0 for the objective "none".

    Args:
        objective: as `choose_objective` settled it.
        step: a recorded forward, with gradient.
        target: the keep ratio asked for now, for "target" and "budget".
        config: weights of the terms.
    """
    if objective == "target":
        return objectives.target_objective(step, target, config.lam, config.per_layer)
    if objective == "budget":
        return objectives.budget_objective(step, target, config.lam, config.per_layer)
    if objective == "load":
        return objectives.load_objective(step, config.alpha)
    if objective == "bce":
        return config.bce * objectives.topk_bce(step)
    return torch.zeros((), device=step.real.device)


def recording_of(model: Any, detach: bool) -> Any:
    """`record_routing` of a converted model; a context that yields None for a dense one."""
    return record_routing(model, detach=detach) if is_converted(model) else contextlib.nullcontext()
