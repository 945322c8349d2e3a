"""What may watch and steer a training run from outside, for example a panel in a notebook."""

from __future__ import annotations

from typing import Any, Protocol


class Monitor(Protocol):
    """`modlab.train(..., monitor=...)` calls these from the thread and process that trains."""

    def step(self, step: int, share: float) -> bool:
        """After every optimiser step. May wait: the run pauses for as long.

        Args:
            step: steps done.
            share: of the run that is done, in [0, 1].

        Returns:
            False ends the run as Ctrl-C would: with a checkpoint if there is a folder.
        """
        ...

    def log(self, row: dict[str, Any]) -> None:
        """After every log line, with its values by the column names of `TrainResult.history`."""
        ...
