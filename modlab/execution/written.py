"""Attention that some tokens skip while the keys and values of all are written (`skip="written"`).

A skipped token attends to nothing, and every later token attends to it all the same. Nothing is saved in the
cache; queries, scores and the output projection are.

Shape letters: B rows, T tokens in, S tokens that attend (of the row that has the most), D model dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.execution.gate import gated_output, straight_through
from modlab.execution.given_keys import (
    cache_name,
    can_gather,
    going_on,
    put_back,
    read,
    reading,
    twin,
    write,
    writing,
)
from modlab.execution.reference import refuse_cache
from modlab.execution.routed import RoutedBranch
from modlab.hf.arguments import LayerArguments
from modlab.routing.rule import over

if TYPE_CHECKING:
    from modlab.execution.site import Site


def run_written_masked(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs an attention module on all tokens; what it says of skipped ones counts as zero, and tells the
    router in a what-if pass what it would have been. Arguments and result as in `reference.run_masked`.
    """
    refuse_cache(arguments)
    keep, gate = site.decision.keep, site.decision.gate
    y, rest = arguments.run(dense, {})
    kept_out = gated_output(site.form, y, 0.0, gate, module.training)
    what_if = module.training and site.call.what_if
    skipped_out = straight_through(over(gate.to(y.dtype), y)) * y if what_if else torch.zeros_like(y)
    return torch.where(over(keep, y), kept_out, skipped_out), rest


def run_written(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs an attention module for the kept tokens on the keys of all. Arguments and result as in
    `packed.run_packed`."""
    x, keep, gate = arguments.hidden, site.decision.keep, site.decision.gate
    index_BS = going_on(keep)
    if index_BS is None or not can_gather(arguments, index_BS, site.attention):
        y, rest = arguments.run(dense, {})
        y = gated_output(site.form, y, 0.0, gate, module.training)
        return torch.where(over(keep, y), y, 0.0), rest
    name = arguments.cache_name() or cache_name(type(module), module)
    assert name is not None, "convert refuses an attention without"
    writes = writing(module, None, arguments.cache())
    states = write(
        writes, lambda: arguments.run(_twin_forward(module, writes), {name: writes}), site.layer_idx
    )
    out = torch.zeros_like(x)
    if not index_BS.shape[1]:
        return out, site.empty_rest
    view = reading(module, None, arguments.cache(), states)
    y_BSD, rest = read(
        arguments, _twin_forward(module, view), name, view, index_BS, site.call, site.attention
    )
    y_BSD = gated_output(site.form, y_BSD, 0.0, gate.gather(1, index_BS), module.training)
    return put_back(out, y_BSD, keep, index_BS), rest


def _twin_forward(module: nn.Module, view: Any) -> Callable[..., Any]:
    dense_class: Any = getattr(module, "dense_class", type(module))
    other = twin(module, view.projections)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return dense_class.forward(other, *args, **kwargs)

    return forward


class WrittenAttention(RoutedBranch):
    """An attention module whose keys and values are those of all tokens, and whose output is that of the
    kept ones."""

    mod_masked = staticmethod(run_written_masked)
    mod_packed = staticmethod(run_written)
