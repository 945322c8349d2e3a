"""Which GPU a kernel goes to, and how large it is."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one: kernels and events go to that, not to where their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Of a GPU; few for Triton's interpreter, which takes its time for each program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def is_before_sm_80(device: torch.device) -> bool:
    """Whether it is a GPU older than Ampere (T4, V100), with 64 or 96 KB of shared memory a program."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
