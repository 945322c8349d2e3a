"""Linear maps of a single row while decoding, by a kernel that reads the weights faster than cuBLAS does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modlab.kernels.decode_linear import decode_linear


class OneTokenLinear(nn.Linear):
    """An `nn.Linear` that is given one token."""

    def forward(self, x_11D: Tensor) -> Tensor:
        """[1, 1, D] in, [1, 1, E] out; what holds more vectors (one a head, say) runs as before."""
        if x_11D.numel() != self.in_features:
            return super().forward(x_11D)
        return decode_linear(x_11D, self.weight, self.bias)


@contextlib.contextmanager
def one_token_linears(model: nn.Module, batch: int) -> Iterator[None]:
    """Inside this block plain half-precision linear layers on a GPU are `OneTokenLinear`s, if `batch` is 1.

    The class is exchanged, not the method: torch.compile then has one graph for all layers, where a method of
    each object's own would cost a compilation each.
    """
    linears = [m for m in model.modules() if _is_plain(m)] if batch == 1 else []
    try:
        for linear in linears:
            linear.__class__ = OneTokenLinear
        yield
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear


def _is_plain(module: nn.Module) -> bool:
    """Exactly `nn.Linear` (quantised and adapted ones know their own way), on a GPU, without hooks."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return half and weight.is_cuda and type(weight.data) is Tensor and weight.stride(1) == 1
