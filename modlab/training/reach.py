"""An early word on a run whose gates do not follow the keep ratio that is asked for."""

from __future__ import annotations

from modlab.warn import warn

LATE, LAG = 1.3, 0.02
"""How far above its target the keep ratio may be, by factor and in shares, before a look ahead."""

MISS, SLACK = 1.2, 0.01
"""The same of where it would end."""

SPAN = 0.1
"""Share of the run over which the gates' speed is taken."""


class Reach:
    """Looks ahead at every log line, from the speed at which gates close; warns once.

    Args:
        aim: the keep ratio that is asked for at the end.
    """

    def __init__(self, aim: float) -> None:
        self.aim = aim
        self.seen: list[tuple[float, float]] = []
        self.warned = False

    def see(self, share: float, kept: float, target: float) -> None:
        """A log line.

        Args:
            share: of the run that is behind.
            kept: keep ratio since the line before.
            target: asked for now.
        """
        self.seen.append((share, kept))
        while len(self.seen) > 2 and share - self.seen[1][0] >= SPAN:
            self.seen.pop(0)
        end = self._end()
        if self.warned or kept <= LATE * target + LAG or end is None or end <= MISS * self.aim + SLACK:
            return
        self.warned = True
        warn(
            f"The gates keep {kept:.2f} where {target:.2f} is asked for by now ({self.aim:g} at the end). At "
            f"their speed the run will end near {end:.2f}: give more tokens, a larger lam or router_lr."
        )

    def _end(self) -> float | None:
        """The keep ratio at the end of the run, at the speed of late; None where too little was seen."""
        (share, kept), (now, last) = self.seen[0], self.seen[-1]
        if now - share < SPAN:
            return None
        return last - max(0.0, kept - last) / (now - share) * (1 - now)
