"""Still pictures without JavaScript and without an imaging library: what a saved notebook shows on its own.

Written with zlib and struct only (PNG, ISO/IEC 15948). White ground, as nobody knows the theme of the reader.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modlab.widgets.pictures.script import RAMP
from modlab.widgets.pictures.words import words

if TYPE_CHECKING:
    from modlab.traces.routing_trace import RoutingTrace

# Capitals and digits of 5 rows; a row is the octal digits of its columns' bits, three columns a digit.
_GLYPHS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757",
    "7": "71122", "8": "75757", "9": "75717", "A": "25755", "B": "65656", "C": "34443", "D": "65556",
    "E": "74647", "F": "74644", "G": "34553", "H": "55755", "I": "72227", "J": "11152", "K": "55655",
    "L": "44447", "M": "57755", "N": "65555", "O": "25552", "P": "65644", "Q": "25563", "R": "65655",
    "S": "34216", "T": "72222", "U": "55557", "V": "55552", "W": "55775", "X": "55255", "Y": "55222",
    "Z": "71247", " ": "00000", ".": "00002", ",": "00024", ":": "02020", "-": "00700", "=": "07070",
    "%": "51245", "/": "11244", "(": "12221", ")": "42224", "+": "02720", "_": "00007",
}  # fmt: skip
INK, FAINT, ACCENT = (31, 35, 40), (97, 106, 115), (11, 98, 196)
LINE, DENSE = (200, 206, 212), (224, 228, 232)
Colour = tuple[int, int, int]


class Picture:
    """RGB pixels uint8[height, width, 3]; everything drawn outside of them is cut off."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels: NDArray[np.uint8] = np.full((height, width, 3), 255, dtype=np.uint8)

    def rect(self, x: float, y: float, width: float, height: float, colour: Any) -> None:
        """A filled rectangle."""
        x0, y0 = max(0, round(x)), max(0, round(y))
        self.pixels[y0 : max(y0, round(y + height)), x0 : max(x0, round(x + width))] = colour

    def text(
        self, x: float, y: float, text: str, colour: Colour = INK, align: float = 0.0, size: int = 2
    ) -> None:
        """One line of capitals, 5 * size pixels high, its top at y; align 0 left, 0.5 centre, 1 right."""
        x -= align * (len(text) * 4 - 1) * size
        for letter in text.upper():
            for row, bits in enumerate(_GLYPHS.get(letter, "07570")):
                for column in range(3):
                    if int(bits) >> (2 - column) & 1:
                        self.rect(x + column * size, y + row * size, size, size, colour)
            x += 4 * size

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, width: int = 2) -> None:
        """A straight line of little squares."""
        steps = int(max(abs(x1 - x0), abs(y1 - y0), 1))
        for x, y in zip(np.linspace(x0, x1, steps + 1), np.linspace(y0, y1, steps + 1), strict=True):
            self.rect(x - width / 2, y - width / 2, width, width, colour)

    def png(self) -> bytes:
        """The picture as a PNG file."""
        height, width, _ = self.pixels.shape
        rows = np.zeros((height, 1 + width * 3), dtype=np.uint8)  # each row begins with its filter: 0, none
        rows[:, 1:] = self.pixels.reshape(height, -1)

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = zlib.compress(rows.tobytes(), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def heatmap_png(trace: RoutingTrace, points: list[dict[str, float]] | None = None, width: int = 960) -> bytes:
    """Tokens by layers, a full cell where the layer kept the token and a thin line where it did not.

    A long text goes on in further bands, at most as many as stay readable; the heading tells if it was cut.
    points: of `page.curve`, drawn below if there are two or more.
    """
    tokens = len(trace.tokens)
    left, right, top = 62, 62, 54
    cell_w = float(np.clip((width - left - right) / max(tokens, 1), 6, 22))
    cell_h = float(np.clip(190 / trace.num_layers, 5, 16))
    columns = max(1, int((width - left - right) // cell_w))
    band = round(trace.num_layers * cell_h) + 34
    bands = max(1, min(-(-tokens // columns), 900 // band or 1))
    shown = min(tokens, bands * columns)
    curves = points if points and len(points) > 1 else []
    picture = Picture(width, top + bands * band + 10 + (190 if curves else 0))

    p = trace.thresholds
    setting = f"P = {p[0]:.3g}" if np.ptp(p) == 0 else f"P = {p.min():.3g} - {p.max():.3g}"
    heading = [setting, f"KEPT {100 * trace.keep.mean():.1f} %"]
    heading += [f"KV {trace.kv_saving:.2f}X SMALLER"]
    if np.isfinite(trace.mean_loss):
        heading += [f"LOSS {trace.mean_loss:.3f}"]
    heading += [f"{tokens} TOKENS" + (f", FIRST {shown} SHOWN" if shown < tokens else "")]
    picture.text(left, 14, "   ".join(heading))
    _legend(picture, left, 34, words(trace.skip))

    for index in range(bands):
        start, y = index * columns, top + index * band
        part = slice(start, min(start + columns, tokens))
        _band(picture, trace, part, left, y, cell_w, cell_h)
    if curves:
        y = top + bands * band + 20
        _curve(picture, curves, "kv_bytes", "KV BYTES BY P", 80, y, width // 2 - 130)
        _curve(picture, curves, "loss", "LOSS BY P", width // 2 + 70, y, width // 2 - 130)
    return picture.png()


def curve_png(points: list[dict[str, float]], width: int = 960) -> bytes:
    """K/V bytes and loss against p, side by side."""
    picture = Picture(width, 186)
    _curve(picture, points, "kv_bytes", "KV BYTES BY P", 80, 20, width // 2 - 130)
    _curve(picture, points, "loss", "LOSS BY P", width // 2 + 70, 20, width // 2 - 130)
    return picture.png()


def _band(
    picture: Picture, trace: RoutingTrace, part: slice, left: int, top: int, cell_w: float, cell_h: float
) -> None:
    count = part.stop - part.start
    every = 1 if cell_h >= 12 else 2 if cell_h >= 7 else 4
    row_of = {layer: row for row, layer in enumerate(trace.layers)}
    for layer in range(trace.num_layers):
        y, row = top + layer * cell_h, row_of.get(layer)
        if layer % every == 0:
            picture.text(left - 8, y + (cell_h - 10) / 2, str(layer), INK if row is not None else FAINT, 1)
            kept = "DENSE" if row is None else f"{100 * trace.keep[row].mean():.0f} %"
            picture.text(left + count * cell_w + 8, y + (cell_h - 10) / 2, kept, FAINT)
        if row is None:
            picture.rect(left, y + 1, count * cell_w - 1, cell_h - 2, DENSE)
            continue
        for column, t in enumerate(range(part.start, part.stop)):
            x = left + column * cell_w
            if trace.keep[row, t]:
                picture.rect(x, y + 1, cell_w - 1, cell_h - 2, colour_of(float(trace.gate[row, t])))
            else:
                picture.rect(x, y + cell_h / 2 - 1, cell_w, 1.6, LINE)
    bottom = top + trace.num_layers * cell_h
    step = next((s for s in (5, 10, 20, 50, 100) if s * cell_w >= 60), 200)
    for column, t in enumerate(range(part.start, part.stop)):
        if t % step == 0:
            picture.text(left + (column + 0.5) * cell_w, bottom + 6, str(t), FAINT, 0.5)
    picture.text(left - 20, bottom + 6, "LAYER", FAINT, 1)


def _legend(picture: Picture, x: int, y: int, said: dict[str, Any]) -> None:
    picture.rect(x, y, 20, 11, colour_of(0.8))
    picture.text(x + 28, y, f"{said['legend_kept']}, darker = higher gate", FAINT)
    picture.rect(x + 310, y + 5, 20, 1.6, LINE)
    picture.text(x + 338, y, said["legend_left"], FAINT)
    picture.rect(x + 530, y, 20, 11, DENSE)
    picture.text(x + 558, y, "DENSE LAYER", FAINT)


def _curve(
    picture: Picture,
    points: list[dict[str, float]],
    key: str,
    title: str,
    x: int,
    y: int,
    width: int,
    height: int = 110,
) -> None:
    ps, values = [d["p"] for d in points], [d[key] for d in points]
    low, high = (0.0, max(values)) if key == "kv_bytes" else (min(values), max(values))
    span_p, span = (max(ps) - min(ps)) or 1.0, (high - low) or 1.0
    picture.text(x, y, title, INK)
    picture.rect(x, y + 20 + height, width, 1, FAINT)
    picture.rect(x, y + 20, 1, height, FAINT)
    for value in (low, high):
        picture.text(x - 6, y + 15 + (1 - (value - low) / span) * height, short(value), FAINT, 1)
    for p in (min(ps), max(ps)):
        picture.text(x + (p - min(ps)) / span_p * width, y + height + 26, f"{p:.2g}", FAINT, 0.5)
    at = [
        (x + (p - min(ps)) / span_p * width, y + 20 + (1 - (value - low) / span) * height)
        for p, value in zip(ps, values, strict=True)
    ]
    for (x0, y0), (x1, y1) in zip(at, at[1:], strict=False):
        picture.line(x0, y0, x1, y1, ACCENT)
    for x0, y0 in at:
        picture.rect(x0 - 3, y0 - 3, 6, 6, ACCENT)


def colour_of(gate: float) -> NDArray[np.int64]:
    """The ramp on a light ground: yellow for a low gate, dark blue for a high one (js/store.js: ramp)."""
    at = min(max(0.97 - 0.97 * gate, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(at), len(RAMP) - 2)
    a, b = np.asarray(RAMP[i]), np.asarray(RAMP[i + 1])
    return np.rint(a + (at - i) * (b - a)).astype(int)


def short(value: float) -> str:
    """Three figures and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
