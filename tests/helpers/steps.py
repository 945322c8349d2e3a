"""The gradient of one optimiser step of `modlab.train`, however its global batch is cut."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM

import modlab
from modlab.integrations.peft import lora_config
from modlab.routing.router import is_router
from tests.helpers.models import scatter_gates, tiny_config

ROWS, LENGTH, VOCABULARY = 8, 24, 97
HIGH = 80  # one row has the tokens from here on, the others those below

AIM = {"keep_ratio": 0.3, "ramp": 0.0, "lam": 8.0}
LAYERS = {"skip": "layer", "layers": "all", "keep_first": 1}
KEYS = {"skip": "kv", "layers": "all", "keep_first": 1, "keep_recent": 4}
HEADS = {**KEYS, "gates": "kv_head", "router_hidden": 4}
DISTIL = {"objective": "distil", "keep_ratio": 0.3, "ramp": 0.0}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "distilled": (None, {"kl": 1.0}),
    "none": (LAYERS, {"objective": "none", "what_if": 0.0}),
    "target": (LAYERS, {"objective": "target", **AIM}),
    "target of each layer": (
        LAYERS,
        {"objective": "target", "per_layer": True, "what_if": 0.0, **AIM},
    ),
    "load": (LAYERS, {"objective": "load", "alpha": 1.0}),
    "budget": (LAYERS, {"objective": "budget", **AIM}),
    "top-k": (
        {"skip": "layer", "layers": "all", "operator": "topk", "capacity": 0.5, "keep_first": 1},
        {"objective": "bce", "bce": 1.0},
    ),
    "cache, with noise": (KEYS, {"objective": "target", **AIM}),
    "distil": (HEADS, DISTIL),
    "distil over a range": (HEADS, {**DISTIL, "keep_range": (0.2, 0.8)}),
    # begins where gates are open: calibrated to .3 a token lies so near the threshold that 16 bit decide it
    # otherwise in the forward without gradient
    "distil in bf16": (HEADS, {**DISTIL, "ramp": 0.5, "mixed_precision": "bf16"}),
    "distil with adapters": (HEADS, DISTIL),
    "distil with adapters and routers of PEFT's": (HEADS, DISTIL),
    "target with adapters": (KEYS, {"objective": "target", **AIM}),
    "distil, keys hidden": (HEADS, {**DISTIL, "what_if": 0.0}),
    "distil, one row keeps": ({**HEADS, "keep_first": 0}, {**DISTIL, "what_if": 0.0}),
    "distil of layers, one row keeps": ({**LAYERS, "keep_first": 0}, {**DISTIL, "what_if": 0.0}),
    "cache, hidden": (KEYS, {"objective": "load", "alpha": 1.0, "what_if": 0.0}),
    "one row keeps": (
        {"skip": "layer", "layers": "all", "keep_first": 0},
        {"objective": "target", "what_if": 0.0, **AIM},
    ),
    "one row keeps and frozen": (
        {"skip": "layer", "layers": "all", "keep_first": 0},
        {"objective": "target", "what_if": 0.0, "freeze_base": True, **AIM},
    ),
}
"""By name: conversion (None: the model stays dense) and settings of the run."""


def data() -> Dataset:
    """Rows whose labels and padding are uneven: long prompts with short answers and the other way round."""
    ids = torch.randint(2, HIGH, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[2] = HIGH + ids[2] % (VOCABULARY - HIGH)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(ROWS):
        labels[row, : 20 if row % 2 else 2] = -100
        if row % 3 == 0:
            mask[row, 16:] = 0
            labels[row, 16:] = -100
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": mask.tolist()}
    )


def model_of(conversion: dict[str, Any] | None, seed: int = 0) -> Any:
    """A small model whose gates differ from token to token."""
    torch.manual_seed(seed)
    config = tiny_config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        initializer_range=0.2,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if conversion is not None:
        modlab.convert(model, modlab.MoDConfig(**conversion))
        scatter_gates(model)
        if model.mod.config.keep_first < 1:
            _keep_high_tokens(model)
    return model


@torch.no_grad()
def adapted(model: Any, routers_of_peft: bool = False) -> Any:
    """The model with adapters that already say something, trained together with its routers.

    Args:
        routers_of_peft: PEFT trains and saves copies of the routers, as `lora_config` has it.
    """
    targets = ["q_proj", "up_proj"]
    if routers_of_peft:
        config = lora_config(model, r=2, target_modules=targets)
    else:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if not routers_of_peft:
            parameter.requires_grad_(".lora_" in name or is_router(name))
    return model


@torch.no_grad()
def _keep_high_tokens(model: Any) -> None:
    """Gates open for the tokens of one row alone: whoever does not have it skips all layers altogether."""
    high = torch.arange(VOCABULARY) >= HIGH
    model.model.embed_tokens.weight[:, 0] = torch.where(high, 12.0, -12.0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        layer.mod_router.weight.mul_(0.1)[..., 0] = 0.3


def after_steps(case: str, batch_size: int, grad_accum: int) -> dict[str, torch.Tensor]:
    """By name: the weights after two steps, and the figures of both; for optimisers that show no gradient."""
    conversion, settings = CASES[case]
    model = model_of(conversion)
    if "adapters" in case:
        model = adapted(model, routers_of_peft="PEFT" in case)
    config = modlab.TrainConfig(
        steps=2, batch_size=batch_size, grad_accum=grad_accum, calibrate=False, log_every=1, warmup=0.0,
        max_grad_norm=0.5, **{"mixed_precision": "no", **settings},
    )  # fmt: skip
    history = modlab.train(model, data(), config, teacher=model_of(None, 1) if config.kl else None).history
    figures = {name: torch.tensor(history[name].tolist()) for name in ("loss", "grad_norm")}
    return {name: p.detach().clone() for name, p in model.named_parameters()} | figures


def gradient(case: str, batch_size: int, grad_accum: int) -> dict[str, torch.Tensor]:
    """By name: the gradients of the step, and the figures of its log line."""
    conversion, settings = CASES[case]
    model, seen = model_of(conversion), {}

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        named = model.named_parameters()
        seen.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    if "adapters" in case:
        model = adapted(model, routers_of_peft="PEFT" in case)
    if settings.get("mixed_precision") == "bf16":
        model.to(torch.bfloat16)  # the routers stay fp32
    handle = register_optimizer_step_pre_hook(note)
    config = modlab.TrainConfig(
        steps=1,
        batch_size=batch_size,
        grad_accum=grad_accum,
        max_grad_norm=1e9,
        calibrate=False,
        **{"mixed_precision": "no", **settings},
    )
    teacher = model_of(None, seed=1) if config.kl else None
    one_row = conversion is not None and conversion.get("keep_first") == 0  # gates stay closed to the others
    try:
        with patch("modlab.training.run.open_gates") if one_row else contextlib.nullcontext():
            row = modlab.train(model, data(), config, teacher=teacher).history.iloc[-1]
    finally:
        handle.remove()
    figures = ("loss", "objective", "keep_ratio", "kl", "grad_norm", "tokens")
    return seen | {f"log {name}": torch.tensor(float(row[name])) for name in figures if name in row}
