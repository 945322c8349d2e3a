"""Tiny models, dense and converted, that tests of every room share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modlab
from modlab.execution.projections import PROJECTIONS
from modlab.routing.router import HiddenRouter, Router


def tiny_config(**changes: object) -> LlamaConfig:
    """A Llama of six layers, 64 wide."""
    sizes: dict[str, object] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**sizes, **changes})


def narrow_config(config_class: Any = LlamaConfig, **changes: object) -> Any:
    """Four layers, 32 wide, of whichever family: about as small as a model with shared KV heads can be."""
    sizes: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return config_class(**{**sizes, **changes})


def dense_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A tiny dense Llama with random weights; `changes` are made to its config."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).eval()


def alternate_layers(**fields: Any) -> modlab.MoDConfig:
    """Every other layer, skipped whole unless `fields` say what else."""
    return modlab.MoDConfig(**{"skip": "layer", "layers": "alternate", **fields})


def routed_llama(
    *,
    gate: Any = "straight-through",
    skip: Any = "layer",
    keep_recent: int = 4,
    gates: Any = "layer",
    router_hidden: int = 0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> Any:
    """The tiny converted Llama with random routers: its gates differ from token to token.

    Args:
        gate, skip, keep_recent, gates, router_hidden: of its MoDConfig, which routes layers 1, 3 and 5.
        scale: how far apart the gates are, see `scatter_gates`.
        device: where it is.
        changes: made to the dense model's config.
    """
    model = modlab.convert(
        dense_llama(**changes),
        alternate_layers(
            gate=gate, skip=skip, keep_recent=keep_recent, gates=gates, router_hidden=router_hidden
        ),
    )
    return scatter_gates(model, scale).to(device)


def leaving_llama(
    skip: Any = "kv+prompt", gates: Any = "layer", dense: Any = None, by: float = 0.04, **fields: Any
) -> Any:
    """The tiny Llama (or `dense`) whose prompt tokens leave after four of six layers, its projections other
    than the dense ones, its gates far apart.

    Args:
        by: spread of what is added to each weight.
        fields: of its MoDConfig.
    """
    if skip == "kv+prompt":
        fields = {"gates": gates, "keep_recent": 6, "keep_first": 2, "layers": "all", **fields}
    model = modlab.convert(dense_llama() if dense is None else dense, modlab.MoDConfig(skip=skip, **fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if PROJECTIONS in name:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return (scatter_gates(model, 4.0) if skip == "kv+prompt" else model).eval()


def scatter_gates(model: Any, scale: float = 1.0, seed: int = 0) -> Any:
    """Random router weights in a converted model, so that its gates differ from token to token.

    Args:
        scale: norm of each gate's weight, so about the standard deviation of its logits.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Router):
            weight = torch.randn(module.weight.shape, generator=generator)
            module.weight.data.copy_(weight * scale / weight.norm(dim=-1, keepdim=True))
            module.bias.data.zero_()
        if isinstance(module, HiddenRouter):  # its input is normalised, and so larger
            module.weight.data.mul_(module.weight.shape[-1] ** -0.5)
            out = torch.randn(module.out.shape, generator=generator)
            module.out.data.copy_(out * scale / out.norm(dim=-1, keepdim=True))
    return model


def spread_gates(model: Any) -> Any:
    """Random router weights under which hardly a gate lies near the threshold; returns the model."""
    return scatter_gates(model, scale=24.0, seed=5)
