"""Uninitialised memory that shows: what `torch.empty` and its like return holds NaN, or a large number.

Fresh memory is often zero, so that code which reads what nobody has written passes its tests. torch can fill
it (`fill_uninitialized_memory`), but in its deterministic mode alone, which runs other kernels than users do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

PLACES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with what is noticed when it is read: NaN, True, or the largest integer."""
    with torch.no_grad():
        if tensor.dtype in FLOATS:
            tensor.fill_(torch.nan)
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif tensor.dtype in INTEGERS:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def poisoning(allocate: Any) -> Any:
    """`allocate`, its result poisoned; left alone while a compiler traces, whose graphs are not to change."""

    @functools.wraps(allocate)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(made) not in (torch.Tensor, torch.nn.Parameter):
            return made
        return poison(made)

    return wrapped


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside this block uninitialised memory is poisoned."""
    with torch.device("meta"):  # such blocks know allocators by identity, and look for them once
        torch.zeros(1)
    own = [getattr(place, name) for place, name in PLACES]
    try:
        for (place, name), allocate in zip(PLACES, own, strict=True):
            setattr(place, name, poisoning(allocate))
        yield
    finally:
        for (place, name), allocate in zip(PLACES, own, strict=True):
            setattr(place, name, allocate)
