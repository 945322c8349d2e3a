"""Which GPU a kernel goes to."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

EARLY = False
"""Whether a kernel of a decoding step may be put on the GPU before the one ahead of it has ended (Hopper's
dependent launches). Whether that pays is for a GPU to say (`python -m benchmarks.decode_speed`)."""


def early_launch() -> dict[str, Any]:
    """What a launch of a kernel that takes `EARLY` says."""
    return {"EARLY": True, "launch_pdl": True} if EARLY else {"EARLY": False}


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one: kernels and events go to that, not to where their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
