"""Batches that are halved where a device's memory does not hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


def halving(items: Sequence[Item], batch: int, run: Callable[[Sequence[Item]], Found]) -> Iterator[Found]:
    """What `run` makes of the items, so many at a time, half as many after each time that memory ran out.

    Raises:
        torch.OutOfMemoryError: of a single item.
    """
    at = 0
    while at < len(items):
        part = items[at : at + batch]
        try:
            found = run(part)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = max(1, min(batch, len(part)) // 2)
            torch.cuda.empty_cache()
            continue
        yield found
        at += len(part)
