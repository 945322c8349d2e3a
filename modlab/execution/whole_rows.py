"""Whole rows without a cache on a GPU, for `skip="kv"`: one kernel instead of a mask.

A mask of a row of 7,000 tokens by 14 query heads has 0.7 GB, is made in every layer, and keeps sdpa off its
flash kernel; probes and evaluations run thousands of such rows. The kernel of what-if passes
(`kernels/weighed_attention.py`) takes keys with log-weights: 0 for kept ones, and for the others so little
that nothing of them is left beyond the recent tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.execution.masked_keys import LEAST_LOG_WEIGHT
from modlab.execution.packed import run_packed
from modlab.execution.reference import given_mask, hiding_mask
from modlab.execution.rounded import rounding
from modlab.execution.weighed_attention import WeighedKeys, weighing_attention
from modlab.execution.what_if_attention import takes_flex
from modlab.hf.arguments import LayerArguments
from modlab.kernels.weighed_attention import HEAD_DIMS, triton
from modlab.routing.rule import over

if TYPE_CHECKING:
    from modlab.execution.site import Site


def run_keys(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs an attention module outside training: whole rows by the kernel where it may, else packed.
    Arguments and result as in `packed.run_packed`."""
    if not takes_whole_rows(module, arguments, site):
        return run_packed(module, dense, arguments, site)
    assert site.recent is not None
    mask_name = arguments.mask_name()
    assert mask_name is not None, "convert refuses an attention without a mask"
    keep, real = site.decision.keep, site.call.real
    log_weight = torch.where(keep, 0.0, LEAST_LOG_WEIGHT)
    keys = WeighedKeys(log_weight, plain=site.recent, instead=functools.partial(_as_mask, arguments, site))
    with weighing_attention(site.routing.model_config):
        y, rest = arguments.run(dense, {mask_name: keys} | rounding(module, arguments, site))
    return torch.where(over(real, y), y, torch.zeros_like(y)), tuple(None for _ in rest)


def _as_mask(arguments: LayerArguments, site: Site) -> Any:
    return hiding_mask(arguments, site, given_mask(arguments, site), may_flex=False)[0]


def takes_whole_rows(module: nn.Module, arguments: LayerArguments, site: Site) -> bool:
    """Whether the kernel may run this forward: no cache, a GPU, heads of a size that it knows, and nothing
    that decides who sees whom but the order of tokens and routing.

    Padding behind a row's tokens is seen by no token; before them it would be. In 32 bit a GPU multiplies
    within the kernel in TF32, which is coarser than what such a model is run for.
    """
    call = site.call
    return (
        site.recent is not None
        and call.cache is None
        and not module.training
        and on_gpu(arguments.hidden)
        and triton is not None
        and not site.routing.compile_layers  # traced layers cannot call it
        and getattr(module, "head_dim", None) in HEAD_DIMS
        and call.documents is None
        and not call.pads_first
        and "flash" not in site.attention
        and takes_flex(site, given_mask(arguments, site), torch.device("cuda"))
        and not bool(site.decision.keep.all())  # then the dense call itself runs, to the bit
    )


def on_gpu(hidden: Tensor) -> bool:
    """Whether attention over these states runs on a GPU in 16 bit. Tests say so of a CPU, where the kernel
    runs in Triton's interpreter."""
    if not hidden.is_cuda:
        return False
    cast = torch.is_autocast_enabled("cuda")
    return (torch.get_autocast_dtype("cuda") if cast else hidden.dtype).itemsize == 2
