"""Counts what makes the host wait for a GPU, on machines without one too."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WAITING = {
    Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero, torch.masked_select,
    Tensor.masked_select, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
}  # fmt: skip


class Waits(TorchFunctionMode):
    """Counts the calls that would make the host wait for a GPU: values asked for, sizes that depend on
    values, uploads of Python lists.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITING:
            self.calls[func.__name__] += 1
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
                self.calls["bool index"] += 1
            if any(isinstance(i, list) for i in index):
                self.calls["list index"] += 1
        elif func is torch.tensor and kwargs.get("device") is not None:
            self.calls["upload"] += 1
        return func(*args, **kwargs)
