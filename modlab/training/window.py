"""The figures of the steps since a run's last log line, summed on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIGURES = ("loss", "objective", "kl", "balance", "grad_norm")


class Window:
    """Sums by name; only reading them waits for the device.

    Each process adds its part of a figure of the global batch, so that a figure is the sum over processes.

    Args:
        layers: routed layers, ascending; each has a figure keep_<layer>.
        device: where the sums are kept.
    """

    def __init__(self, layers: list[int], device: torch.device) -> None:
        self.names = (*FIGURES, *(f"keep_{i}" for i in layers))
        self.sums = {name: torch.zeros((), device=device) for name in self.names}
        self.steps = 0

    def add(self, figures: dict[str, Tensor]) -> None:
        """One step's figures, scalars by name."""
        for name, value in figures.items():
            self.sums[name] += value
        self.steps += 1

    def read(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The sums over processes; waits for the device."""
        values = summed(torch.stack(list(self.sums.values()))).tolist()
        return dict(zip(self.names, values, strict=True))

    def clear(self) -> None:
        """A log line has been written."""
        for value in self.sums.values():
            value.zero_()
        self.steps = 0

    def restore(self, sums: dict[str, float], steps: int, is_main: bool) -> None:
        """From a checkpoint: what `read` gave. One process has it all, the others begin at 0.

        Raises:
            ValueError: those are other figures.
        """
        if set(sums) != set(self.names):
            raise ValueError(f"its window has the figures {sorted(sums)}")
        for name, value in self.sums.items():
            value.fill_(sums[name] if is_main else 0.0)
        self.steps = steps
