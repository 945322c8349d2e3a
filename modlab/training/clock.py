"""The time of a run: how long it has trained, how much of its minutes is behind, how fast it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Clock:
    """Counts a run's seconds from `start` on, and those of the calls that it resumes.

    Args:
        minutes: that this call may take, or that the whole run takes; None for no limit.
        of_main: gives every process the main one's number: they have to decide alike.
        now: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        minutes: float | None = None,
        of_main: Callable[[float], float] = float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limit = 60 * (minutes or 0.0)
        self.of_main = of_main
        self.now = now
        self.seconds_before = 0.0
        self.share_before = 0.0
        self.started = self.mark = now()
        self.mark_tokens = 0
        self.warm: float | None = None  # seconds at the end of this call's first step

    def start(self, tokens: int) -> None:
        """The first step is about to begin, with so many tokens trained on in earlier calls."""
        self.started = self.mark = self.now()
        self.mark_tokens = tokens

    def step_done(self) -> None:
        """The first step may compile for a minute: it takes nothing off the schedule."""
        if self.warm is None:
            self.warm = self.of_main(self.seconds)

    @property
    def seconds(self) -> float:
        """Trained in all."""
        return self.seconds_before + self.now() - self.started

    @property
    def share(self) -> float:
        """How much of a run that is as long as its minutes is behind, in [0, 1]."""
        if self.warm is None:
            return self.share_before
        ahead = max(self.limit - self.warm, 1e-9)
        gone = (self.of_main(self.seconds) - self.warm) / ahead
        return min(1.0, self.share_before + (1 - self.share_before) * gone)

    @property
    def left(self) -> float:
        """Seconds left of a run that is as long as its minutes."""
        return max(0.0, self.limit - self.seconds)

    @property
    def is_over(self) -> bool:
        """Whether this call has taken its minutes."""
        return self.of_main(self.now() - self.started) > self.limit

    def tokens_per_second(self, tokens: int) -> float:
        """Since the mark, if so many tokens are behind now."""
        return (tokens - self.mark_tokens) / max(self.now() - self.mark, 1e-9)

    def set_mark(self, tokens: int) -> None:
        """Speed is measured from here on."""
        self.mark, self.mark_tokens = self.now(), tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes none of the run's time."""
        began = self.now()
        try:
            yield
        finally:
            self.started += self.now() - began
            self.mark += self.now() - began

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """What happens inside takes the run's time, but is no slow training."""
        began = self.now()
        try:
            yield
        finally:
            self.mark += self.now() - began

    def state(self, share: float) -> dict[str, float]:
        """For a checkpoint; `share` of the run is behind."""
        return {"seconds": self.seconds, "share": share}

    def restore(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self.seconds_before, self.share_before = float(state["seconds"]), float(state["share"])
