"""Masked execution where routing decides about the cache alone (`skip="kv"`): the reference and its training.

Every token passes the layer in full. Who is hidden from whom is one mask: a token attends to kept tokens not
after it and to its latest `keep_recent` tokens, kept or not. Packed execution (`packed.py`) must agree with
it within rounding. Training runs in this form: it has no cache, and no token to leave out.

In a what-if pass a token is not hidden or seen but weighed, so that the loss tells the router what its keys
and values are worth to later tokens. The weight is a sigmoid of the router's logit above the threshold's,
with logistic noise and at a low temperature: a relaxed coin whose odds are the gate, where p = 0.5 (Maddison
et al., arXiv 1611.00712); DMS (arXiv 2506.05345) trains evictions from a cache that way. Beyond the recent
tokens its logarithm is added to the attention scores.

Shape letters: B batch rows, T tokens, N query heads, G gates of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modlab.execution.masks import (
    MaskValues,
    as_attention_mask,
    masked_reference_mask,
    of_keys,
    recent_mask,
    untold_window,
    visible_mask,
)
from modlab.execution.reference import given_mask, hiding_mask, refuse_cache
from modlab.execution.rounded import rounding
from modlab.execution.weighed_attention import weighed_keys, weighing_attention
from modlab.execution.what_if_attention import takes_flex
from modlab.hf.arguments import LayerArguments
from modlab.routing.rule import over, protected

if TYPE_CHECKING:
    from modlab.execution.site import Site

TEMPERATURE = 0.3
"""Of the relaxed coin: towards 0 it falls on its faces, and hands less gradient to the router."""

LEAST_LOG_WEIGHT = -1e4
"""At most this much is taken off a score; fp16 holds it."""


def run_masked_keys(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs an attention module on all tokens, with the keys of those that are not kept hidden (or, in a
    what-if pass, weighed). Arguments and result as in `reference.run_masked`; padding comes out as zero.
    """
    refuse_cache(arguments)
    mask_name = arguments.mask_name()
    assert mask_name is not None, "convert refuses an attention without a mask"
    real, given = site.call.real, given_mask(arguments, site)
    attention: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    weighs = module.training and site.call.what_if and site.call.override is None
    if weighs:
        mask, attention = weighing_mask(arguments, site, given)
    else:
        mask, attention = hiding_mask(arguments, site, given, may_flex=module.training)
    changes = {mask_name: mask} | rounding(module, arguments, site)
    if weighs and torch.is_grad_enabled() and site.decision.logit.requires_grad:  # else nothing asks for it
        changes[arguments.hidden_name] = with_gradient(arguments.hidden)
    with attention:
        y, rest = arguments.run(dense, changes)
    y = torch.where(over(real, y), y, torch.zeros_like(y))
    if module.training:
        # DistributedDataParallel wants every parameter in the graph of every step.
        y = y + (0.0 * site.decision.logit.sum()).to(y.dtype)
    return y, rest


def with_gradient(hidden: Tensor) -> Tensor:
    """Hidden states that take part in the backward pass, as they do not below the first router of a frozen
    base: on a GPU torch's sdpa gives a mask no gradient where queries, keys and values need none (torch 2.11:
    "LSE is not correctly aligned").
    """
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_()


def weighing_mask(
    arguments: LayerArguments, site: Site, given: MaskValues
) -> tuple[Any, contextlib.AbstractContextManager[None]]:
    """The log-weights of keys with who may see whom, in the form that the attention takes, and the block in
    which it takes it: joined inside flex attention where that is possible."""
    real, log_weight = site.call.real, key_log_weight(site)
    assert site.recent is not None
    if takes_flex(site, given, real.device):
        keys = weighed_keys(
            log_weight, real, site.recent, site.call.documents,
            padded=site.call.padding_mask is not None, at_once=site.routing.compile_layers,
        )  # fmt: skip
        return keys, weighing_attention(site.routing.model_config)
    seen = visible_mask(given, given.keys_RK, given.keys_RK, untold_window(given, site), site.attention)
    visible, dtype = masked_reference_mask(real, real, visible=seen), arguments.hidden.dtype
    if torch.is_autocast_enabled(real.device.type):  # a mask of [B, 1, T, T] is large, and cast anyway
        dtype = torch.get_autocast_dtype(real.device.type)
    mask = as_attention_mask(visible, "additive", dtype, given if given.additive else None)
    return mask + log_weights(log_weight.to(mask.dtype), site), contextlib.nullcontext()


def key_log_weight(site: Site) -> Tensor:
    """Logarithm of the weight that each token's key has in a what-if pass, at most 0, for protected tokens 0;
    [B, T] or [B, T, G], fp32, with gradient. What is drawn follows from `Routing.noise`, or is another in
    each call."""
    logit = site.decision.logit
    logit = logit - site.call.threshold_logit(site.layer_idx, logit)
    uniform = _uniform(logit, site).clamp(1e-6, 1 - 1e-6)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    log_weight = F.logsigmoid((logit + noise) / TEMPERATURE).clamp(min=LEAST_LOG_WEIGHT)
    first = protected(site.call.position_ids, site.routing.config.keep_first)
    return log_weight.masked_fill(over(first, log_weight), 0.0)


def _uniform(logit: Tensor, site: Site) -> Tensor:
    if site.call.noise is None:
        return torch.rand_like(logit)
    return site.call.noise.uniform(site.layer_idx, site.call.real, logit[0, 0].numel()).view_as(logit)


def log_weights(log_weight: Tensor, site: Site) -> Tensor:
    """What a what-if pass adds to the attention scores: each key's log-weight, [B, T] or [B, T, G], and 0 for
    recent keys; [B, 1 or N, T, T]."""
    assert site.recent is not None
    tokens_BT = site.call.real.cumsum(1)
    recent = recent_mask(tokens_BT, tokens_BT, site.recent)
    return torch.where(recent, log_weight.new_zeros(()), of_keys(log_weight, site.query_heads))
