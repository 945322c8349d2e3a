"""Small numbers between the host and the GPU, without either waiting longer than it has to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers`, of the host, on the device: a copy that the host does not wait for."""
    cuda = device.type == "cuda"
    return (numbers.pin_memory() if cuda else numbers).to(device, non_blocking=cuda)


class Fetched:
    """Numbers on their way to the host, to be read as late as possible.

    Args:
        numbers: of the device, as they stand in the stream.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event: Any = None
        self._host = numbers
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """The numbers; waits for their copy, and for nothing that the device was told to do after it."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._host.tolist()
        return numbers
