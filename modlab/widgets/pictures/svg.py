"""Still pictures without JavaScript and without a drawing library: what a saved notebook shows on its own.

An SVG is text, so its letters are the reader's own and sharp at any size. White ground, as nobody knows the
theme of the reader; attributes only, as sites that show notebooks take styles and scripts away.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from xml.sax.saxutils import escape

import numpy as np

from modlab.widgets.pictures.script import RAMP

INK, FAINT, ACCENT, WORSE = "#1f2328", "#616a73", "#0b62c4", "#d9730d"
LINE, DENSE = "#c8ced4", "#e0e4e8"
SIZE = 12  # of letters
MONO = 0.602 * SIZE  # width of a letter where all are alike

_FONTS = {
    "sans": "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif",
    "mono": "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace",
}

Box = tuple[float, float, float, float]  # x, y, width, height


class Picture:
    """A picture that grows from back to front; `svg` gives its text."""

    def __init__(self, width: int, height: float, title: str) -> None:
        self.width, self.height = width, round(height)
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" font-size="{SIZE}" '
            f'font-family="{_FONTS["sans"]}">',
            f"<title>{_clean(title)}</title>",
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
        ]

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle."""
        self.rects(colour, [(x, y, width, height)])

    def rects(self, colour: str, boxes: Iterable[Box]) -> None:
        """Filled rectangles of one colour, as one element: a heatmap has thousands."""
        path = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z" for x, y, w, h in boxes)
        if path:
            self._parts.append(f'<path fill="{colour}" d="{path}"/>')

    def ring(self, x: float, y: float, width: float, height: float, colour: str = INK) -> None:
        """The edge of a rectangle."""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="none" '
            f'stroke="{colour}" stroke-width="2"/>'
        )

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, width: float = 2, dashes: str = ""
    ) -> None:
        """A line from point to point."""
        at = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'
        )

    def text(
        self, x: float, y: float, text: str, colour: str = INK, align: float = 0.0, bold: bool = False
    ) -> None:
        """One line, its base at y; align 0 left, 0.5 centre, 1 right."""
        anchor = {0.0: "", 0.5: ' text-anchor="middle"', 1.0: ' text-anchor="end"'}[align]
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" fill="{colour}"{anchor}{weight}>{_clean(text)}</text>'
        )

    def code(self, x: float, y: float, text: str, colour: str = INK) -> None:
        """One line in letters of one width, stretched to what `columns` says, whatever the reader's font."""
        if not text.strip():
            return
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" fill="{colour}" font-family="{_FONTS["mono"]}" '
            f'textLength="{_n(columns(text) * MONO)}" lengthAdjust="spacingAndGlyphs" '
            f'xml:space="preserve">{_clean(text)}</text>'
        )

    def svg(self) -> str:
        """The picture as text."""
        return "\n".join([*self._parts, "</svg>"])


def columns(text: str) -> int:
    """How many letters wide it is, those of East Asia and pictographs counting twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def colour_of(gate: float) -> str:
    """The ramp on a light ground: yellow for a low gate, dark blue for a high one (js/helpers.js: ramp)."""
    return "#" + "".join(f"{level:02x}" for level in _levels(gate))


def blue(share: float) -> str:
    """From nearly white to the accent, for the ground of a token (js/text.js: colourSpan)."""
    strength, accent = 0.12 + 0.8 * share, [int(ACCENT[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + strength * (level - 255)):02x}" for level in accent)


def ink_on(gate: float) -> str:
    """White or black, whichever can be read on `colour_of(gate)`."""
    return "#ffffff" if sum(_levels(gate)) < 380 else "#000000"


def _levels(gate: float) -> list[int]:
    at = min(max(0.97 - 0.97 * gate, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(at), len(RAMP) - 2)
    a, b = np.asarray(RAMP[i]), np.asarray(RAMP[i + 1])
    return [int(level) for level in np.rint(a + (at - i) * (b - a))]


def _n(value: float) -> str:
    """A number as short as a tenth of a pixel allows."""
    return f"{value:.1f}".rstrip("0").rstrip(".") or "0"


def _clean(text: str) -> str:
    """Text as XML takes it: no control characters, no halves of a character."""
    return escape("".join(c if c >= " " and not 0xD800 <= ord(c) < 0xE000 else "\ufffd" for c in text))
