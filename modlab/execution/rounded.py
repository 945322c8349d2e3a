"""Keys and values in fewer bits where no cache is: attention sees them as a cache would give them back.

An attention hands its keys and values to its cache and attends to what it gets back. So in a forward without
one a view stands in the cache's place, which stores nothing and rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.cache.range import KVRange
from modlab.hf.arguments import LayerArguments
from modlab.skips.plain import ProbeCache, cache_name

if TYPE_CHECKING:
    from modlab.execution.site import Site


class RoundedView(ProbeCache):
    """Stands in the place of a cache that was given nothing before, for one layer."""

    def __init__(self, range: KVRange) -> None:
        super().__init__()
        self.range = range

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [R, G, S, H] as they would come from a cache. Gradients pass by the rounding."""
        keys, values = self.range.rounded(key_states.detach(), value_states.detach())
        if not torch.is_grad_enabled():
            return keys, values
        return _InPlaceOf.apply(keys, key_states), _InPlaceOf.apply(values, value_states)

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The key by which sparse attention picks, [R, S, H]: a cache stores it as it is."""
        return indexer_key_states


class _InPlaceOf(torch.autograd.Function):
    """The first tensor's numbers, with the second's gradient."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, given: Tensor) -> Tensor:
        return numbers.clone()  # an input returned as it is would count as a view

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return None, *gradient


def rounding(module: nn.Module, arguments: LayerArguments, site: Site) -> dict[str, Any]:
    """What a forward of `module` without a cache changes among its arguments, so that keys and values are
    rounded: nothing where they are stored in the model's type, and nothing in training."""
    learns = module.training and not site.call.generates
    if site.range is None or learns or arguments.cache_name() is not None:
        return {}
    return {cache_name(arguments): RoundedView(site.range)}
