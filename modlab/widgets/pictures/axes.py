"""Two scales with their names, and lines in between: for the still curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from modlab.widgets.pictures.svg import ACCENT, FAINT, INK, LINE, Picture

Point = tuple[float, float]
LEAST_LOSS = 0.1
"""Nats that an axis of losses spans at least: a smaller span draws the noise of one text as a cliff."""


class Axes:
    """A rectangle of the picture whose scales hold all that is to be drawn there.

    Args:
        left, top, width, height: of the rectangle, in pixels; the title stands above it.
        points: what has to find room.
        least: how far the vertical scale spans at least.
        from_zero: whether the vertical scale begins at zero.
        form: writes the values of the vertical scale; `form_x` those of the horizontal one.
    """

    def __init__(
        self,
        picture: Picture,
        box: tuple[float, float, float, float],
        points: Iterable[Point],
        least: float = 0.0,
        from_zero: bool = False,
        form: Callable[[float], str] | None = None,
        form_x: Callable[[float], str] | None = None,
    ) -> None:
        self.picture = picture
        self.left, self.top, self.width, self.height = box
        xs, ys = zip(*points, strict=True)
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = span(ys, least)
        if from_zero:
            self.y0 = 0.0
        self.form, self.form_x = form or short, form_x or short

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point."""
        across = (x - self.x0) / ((self.x1 - self.x0) or 1)
        up = (y - self.y0) / ((self.y1 - self.y0) or 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def frame(self, title: str, below: str = "") -> None:
        """Title, axes, values at the ends and in the middle of both scales, and a name for the lower one."""
        draw, bottom = self.picture, self.top + self.height
        draw.text(self.left, self.top - 10, title, INK, bold=True)
        for share in (0.0, 0.5, 1.0):
            value, y = self.y0 + share * (self.y1 - self.y0), bottom - share * self.height
            draw.rect(self.left, y, self.width, 1, LINE if share else FAINT)
            draw.text(self.left - 8, y + 4, self.form(value), FAINT, 1.0)
            value, x = self.x0 + share * (self.x1 - self.x0), self.left + share * self.width
            draw.text(x, bottom + 18, self.form_x(value), FAINT, 0.5)
        if below:
            draw.text(self.left + self.width / 2, bottom + 34, below, FAINT, 0.5)

    def line(
        self,
        points: Iterable[Point],
        colour: str = ACCENT,
        width: float = 2,
        dashes: str = "",
        dots: bool = False,
    ) -> None:
        """A line through the points, with a mark on each if wanted."""
        at = [self.at(x, y) for x, y in points]
        self.picture.line(at, colour, width, dashes)
        if dots:
            self.picture.rects(colour, [(x - 3, y - 3, 6, 6) for x, y in at])

    def level(self, y: float, name: str) -> None:
        """A dashed line all across, with its name."""
        self.line([(self.x0, y), (self.x1, y)], FAINT, 1.5, "5 4")
        self.picture.text(self.left + self.width, self.at(self.x1, y)[1] - 5, name, FAINT, 1.0)


def span(values: Sequence[float], least: float = 0.0) -> tuple[float, float]:
    """The ends of a scale that holds these values and spans at least `least`, around their middle."""
    low, high = min(values), max(values)
    missing = max(0.0, least - (high - low)) / 2
    return low - missing, high + missing


def short(value: float) -> str:
    """Three figures."""
    return f"{value:.3g}"


def byte_text(n: float) -> str:
    """Three figures and a unit, as js/helpers.js: byteText writes them."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n >= 999.5 * 1024 ** (power - 1):
            return f"{n / 1024**power:.3g} {unit}"
    return f"{n:.0f} B"
