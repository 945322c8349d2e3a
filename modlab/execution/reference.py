"""The specification of a routed module, in masked form: every token runs, a mask decides what counts.

Slow on purpose and simple. Packed execution (`packed.py`) must agree with it within rounding, which the tests
hold for random routings, batches and paddings. Training uses it for what-if passes, in which skipped tokens
run too and tell the router what they would have gained.

Shape letters: B batch rows, T tokens, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.errors import ModlabError
from modlab.execution.gate import gated_output, scaled_branches, straight_through
from modlab.execution.masks import (
    MaskValues,
    as_attention_mask,
    masked_reference_mask,
    untold_window,
    visible_mask,
)
from modlab.execution.what_if_attention import (
    flex_attention,
    takes_flex,
    what_if_block_mask,
)
from modlab.hf.arguments import LayerArguments
from modlab.routing.rule import over

if TYPE_CHECKING:
    from modlab.execution.site import Site


def run_masked(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs `module` on all tokens; kept ones attend to kept ones alone, the others come out as if skipped.

    Args:
        module: the routed layer, attention or MLP.
        dense: its unrouted forward.
        arguments: of this call, with hidden states [B, T, D] and no cache.
        site: the decision and what surrounds it.

    Returns:
        output [B, T, D] and the rest of the module's output tuple (() if it returned a tensor).
    """
    refuse_cache(arguments)
    keep, gate = site.decision.keep, site.decision.gate
    what_if = module.training and site.call.what_if
    changes: dict[str, Any] = {}
    attention: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    mask_name = arguments.mask_name()
    if mask_name is not None:
        given = given_mask(arguments, site)
        changes[mask_name], attention = hiding_mask(arguments, site, given, may_flex=what_if)

    weight = None
    if site.form == "scaled":
        skipped_weight = straight_through(gate) if what_if else torch.zeros_like(gate)
        weight = torch.where(keep, gate, skipped_weight)
    with attention, scaled_branches(module, site.branch_ends, weight):
        y, rest = arguments.run(dense, changes)

    skipped = arguments.hidden if site.residual else torch.zeros_like(y)
    kept_out = gated_output(site.form, y, skipped, gate, module.training)
    if site.form == "scaled":
        return (kept_out if what_if else torch.where(over(keep, y), kept_out, skipped)), rest
    skipped_out = (
        skipped + straight_through(over(gate.to(y.dtype), y)) * (y - skipped) if what_if else skipped
    )
    return torch.where(over(keep, y), kept_out, skipped_out), rest


def refuse_cache(arguments: LayerArguments) -> None:
    """An error where a module in masked form is called with a cache."""
    if arguments.cache_name() is not None:
        raise ModlabError("the masked reference runs without a cache: call the model with use_cache=False.")


def given_mask(arguments: LayerArguments, site: Site) -> MaskValues:
    """The mask that the model made for all tokens of a call without a cache; an error for flash attention."""
    if "flash" in site.attention:
        packs = ", or model.mod.what_if = False" if site.recent is None else ""
        raise ModlabError(
            "what-if passes and the masked reference need a mask, which flash attention does not take: "
            f"use model.set_attn_implementation('sdpa'){packs}."
        )
    real = site.call.real
    rows_B1 = torch.arange(len(real), device=real.device)[:, None]
    columns_BT = site.call.columns.expand_as(real)  # no cache: time positions and columns are the same
    return MaskValues(arguments.mask(), rows_B1, columns_BT, columns_BT, site.call.num_columns)


def hiding_mask(
    arguments: LayerArguments, site: Site, given: MaskValues, may_flex: bool
) -> tuple[Any, contextlib.AbstractContextManager[None]]:
    """`masked_reference_mask` in the form that the attention takes, and the block in which it takes it: as a
    rule for flex attention where that is allowed and possible."""
    keep, real = site.decision.keep, site.call.real
    if may_flex and takes_flex(site, given, keep.device):
        blocks = what_if_block_mask(
            keep, real, site.recent or 1, site.call.documents, query_heads=site.query_heads
        )
        return blocks, flex_attention(site.routing.model_config)
    visible = visible_mask(given, given.keys_RK, given.keys_RK, untold_window(given, site), site.attention)
    allowed = masked_reference_mask(
        keep, real, recent=site.recent, visible=visible, query_heads=site.query_heads
    )
    mask = as_attention_mask(allowed, site.attention, arguments.hidden.dtype, given)
    return mask, contextlib.nullcontext()
