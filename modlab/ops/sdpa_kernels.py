"""Which of torch's attention kernels may run where routing changes shapes, or weighs keys.

Shape letters: B batch rows, T tokens, D model dim.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_kernels(x_BTD: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keeps torch's sdpa off cuDNN on a GPU: while it runs on kept tokens, or on a ragged cache, and where a
    mask has a gradient.

    cuDNN plans anew for every shape it has not met, and these have a new shape almost every step: measured on
    an H200, 3.6 ms a kept layer and token at 8k, where the layer itself takes 0.8 ms (docs/log.md). And it
    has no gradient for a mask.
    """
    if not x_BTD.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
