"""Which GPU a kernel goes to."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one: kernels and events go to that, not to where their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
