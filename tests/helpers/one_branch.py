"""What a model must compute where a token skips no whole layer: by the oracle, and for one branch by hand.

A skipped token passes the dense layer with all weights of the branch at zero: whatever the branch does with
the residual, it does here too. A kept token passes the dense layer; where it is the attention that is
skipped, among kept tokens only, as where whole layers are skipped (held against its own proof).

Shape letters: B batch rows, T tokens, D model dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import modlab
from modlab.families.proof import (
    STEPS_TOLERANCE,
    TOLERANCE,
    Batch,
    Unproven,
    as_the_oracle_says,
    some_tokens,
)
from modlab.families.tiny_models import quiet, tiny_model
from modlab.hf.anatomy import NORM, attention_name, decoder_layers, mlp_name
from modlab.routing.state import masked_execution, record_routing

RECENT = 3
"""`keep_recent`: shorter than the rows, longer than nothing."""
BY_HAND = ("attention", "mlp")
LEAVING = ("prompt", "kv+prompt")
"""Skips with which keys and values come from another state, so that open gates are not the dense model."""


@torch.no_grad()
def prove_one_branch(model_type: str, skip: Any, **settings: Any) -> None:
    """Holds a tiny model of the type, with this branch routed in all layers, against the dense one, its own
    masked reference, and the computation by hand.

    Args:
        skip, settings: of the MoDConfig.

    Raises:
        Unproven: one of them does not hold.
        ModlabError: the branch is refused.
    """
    with quiet():
        dense = tiny_model(model_type)
    batch = Batch(dense)
    batch.one_row()  # BigBird swaps a module of its own in its first forward
    dense_BTV = batch.logits()
    if leaks := batch.padding_leaks(dense_BTV):  # the batch's first row has no padding
        dense_BTV = dense_BTV[:1]
    batch.choose_cuts(dense_BTV)
    branch = trained(modlab.convert(copy.deepcopy(dense), config_of(skip, **settings)))

    batch.model = branch
    with modlab.routing_override(
        branch, no_token
    ):  # first of all: no forward has shown what the branch returns
        packed_BTV = batch.logits()
        with masked_execution(branch):
            batch.agree("with nothing kept, packed differs from masked", packed_BTV, batch.logits())
    opened_BTV = batch.logits()
    if skip not in LEAVING:
        batch.agree("open gates differ from the dense model", opened_BTV[: len(dense_BTV)], dense_BTV)
    last_left(batch, opened_BTV)
    with modlab.routing_override(branch, some_tokens):
        with record_routing(branch) as recording:
            packed_BTV = batch.logits()
        with masked_execution(branch):
            masked_BTV = batch.logits()
        step = recording.steps[0]
        as_the_oracle_says(batch, dense, step, leaks, packed=packed_BTV, masked=masked_BTV)
        steps_BTV = batch.logits_in_steps(modlab.RaggedCache(branch))
        last_left(batch, masked_BTV)
    batch.agree("packed execution differs from the masked reference", packed_BTV, masked_BTV)
    batch.agree("cached steps differ from one forward", steps_BTV, masked_BTV, STEPS_TOLERANCE)

    if skip not in BY_HAND:
        if batch.difference(masked_BTV[: len(dense_BTV)], dense_BTV) < 10 * TOLERANCE:
            raise Unproven("routing does not change the logits")
        learns(batch, branch)
        return
    whole = modlab.convert(copy.deepcopy(dense), modlab.MoDConfig(skip="layer", layers="all"))
    for layer in branch.mod.layers:
        keep_BT = some_tokens(layer, torch.empty(0), batch.positions_BT)
        without = without_branch(dense, layer, skip)
        skipped_BTD = layer_output(batch, without, layer)
        kept_BTD = layer_output(batch, dense if skip == "mlp" else whole, layer)
        by_hand_BTD = torch.where(keep_BT[..., None], kept_BTD, skipped_BTD)
        got_BTD = layer_output(batch, branch, layer)
        rows = slice(1 if leaks else None)
        batch.agree(
            f"layer {layer} differs from a computation by hand", got_BTD[rows], by_hand_BTD[rows], TOLERANCE
        )


def config_of(skip: Any, **settings: Any) -> modlab.MoDConfig:
    """All layers routed, or with skip="prompt" those above the point of leaving."""
    if skip != "prompt":
        settings |= {"layers": "all", "keep_recent": RECENT}
    return modlab.MoDConfig(skip=skip, **settings)


def trained(model: Any) -> Any:
    """Trained projections, where there are any, become other ones than the base's; returns the model."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "mod_projections" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.detach().std())
    return model


def last_left(batch: Batch, wanted_BTV: Tensor) -> None:
    """Where the last token of each row is asked for alone, and the others may leave, it says the same; the
    batch is padded on the left."""
    if batch.model.mod.config.skip not in LEAVING:
        return
    for use_cache in (False, True):
        last_B1V = batch.model(**batch.inputs(), use_cache=use_cache, logits_to_keep=1).logits
        worst = (last_B1V - wanted_BTV[:, -1:]).abs().max() / wanted_BTV[:, -1:].abs().max()
        if not worst <= TOLERANCE:
            raise Unproven(f"a prompt that leaves has another last token: logits differ by {worst:.1g}")


@torch.enable_grad()
def learns(batch: Batch, model: Any) -> None:
    """A what-if pass gives every router and every trained projection a gradient."""
    batch.model = model.train()
    batch.logits().square().sum().backward()
    for index in model.mod.layers:
        for name, weight in decoder_layers(model)[index].named_parameters():
            if name != "mod_router.weight" and not (
                name.startswith("mod_projections") and name.endswith("weight")
            ):
                continue
            if weight.grad is None or not weight.grad.any() or not weight.grad.isfinite().all():
                raise Unproven(f"{name} of layer {index} gets no gradient, or none that is finite")


def no_token(layer_idx: int, gate_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Nothing is kept."""
    return torch.zeros_like(gate_BT, dtype=torch.bool)


def without_branch(dense: Any, layer: int, skip: str) -> Any:
    """A copy of the dense model with the weights of one layer's branch at zero, those of its norms aside."""
    model = copy.deepcopy(dense)
    module = decoder_layers(model)[layer]
    name = attention_name(module) if skip == "attention" else mlp_name(module)
    assert name is not None
    for inside in module.get_submodule(name).modules():
        if not NORM.search(type(inside).__name__):
            for weight in inside.parameters(recurse=False):
                weight.zero_()
    return model


def layer_output(batch: Batch, model: Any, layer: int) -> Tensor:
    """What one layer returns for the batch, [B, T, D] (parallel streams in D), where some tokens skip it or
    its branch and all other layers run in full."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, (tuple, list)) else output)

    def only_here(index: int, gate_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        if index == layer:
            return some_tokens(index, gate_BT, position_ids_BT)
        return torch.ones_like(gate_BT, dtype=torch.bool)

    batch.model = model
    hook = decoder_layers(model)[layer].register_forward_hook(note)
    try:
        if modlab.is_converted(model):
            with modlab.routing_override(model, only_here), masked_execution(model):
                batch.logits()
        else:
            batch.logits()
    finally:
        hook.remove()
    (hidden,) = found
    if hidden.dim() == 4 and hidden.shape[:2] != batch.ids_BT.shape:
        hidden = hidden.movedim(0, 2)  # streams in front
    return hidden.flatten(2)
