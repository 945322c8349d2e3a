"""Every trained weight of a routed layer has a gradient in every step, if only of 0.

Where all tokens of a process skip a layer its weights would have none there: DDP would wait for it for ever,
FSDP2 gathers and sums only what a process's own graph passes through, so that the others would wait for it,
and AdamW treats no gradient otherwise than one of 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from modlab.execution.routed import CALL
from modlab.hf.anatomy import decoder_layers
from modlab.routing.router import is_router
from modlab.routing.state import is_converted
from modlab.training.loader import Batches


def may_skip_all(model: Any, source: Batches) -> bool:
    """Whether a process may have no token that a routed layer keeps: first tokens may be skipped, or rows may
    be padding throughout."""
    return is_converted(model) and (model.mod.config.keep_first < 1 or "attention_mask" in source.first)


@contextlib.contextmanager
def anchored(model: Any) -> Iterator[None]:
    """Inside, what a routed layer returns depends on its gates and on all its trained weights.

    To be entered before FSDP2 shards the model: the weights are whole in hooks that are older than its own.
    """
    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(_anchor, with_kwargs=True) for i in model.mod.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _anchor(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return None
    gate = kwargs[CALL].call.decisions[layer.mod_plan.layer_idx].gate
    # Routers are reached by their gates; "." as in the names of a whole model, by which they are known.
    weights = [p for name, p in layer.named_parameters() if p.requires_grad and not is_router("." + name)]
    ends = torch.stack([gate.sum(), *(weight.flatten()[0].float() for weight in weights)])
    nothing = ends.sum() * 0.0
    if isinstance(output, tuple):
        return (output[0] + nothing.to(output[0].dtype), *output[1:])
    return output + nothing.to(output.dtype)
