"""The still picture of a trace: tokens by layers, the text itself below, and what a threshold costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modlab.config import KV_BITS
from modlab.widgets.pictures.axes import LEAST_LOSS, Axes, byte_text, short
from modlab.widgets.pictures.svg import (
    DENSE,
    FAINT,
    INK,
    LINE,
    MONO,
    Picture,
    blue,
    colour_of,
    columns,
)
from modlab.widgets.pictures.words import words

if TYPE_CHECKING:
    from modlab.traces.routing_trace import RoutingTrace

LEFT, RIGHT = 62, 62
LINES, LINE_HEIGHT = 14, 20  # of the text, at most; pixels of one
SHADES = 24  # colours that gates are drawn in


def trace_svg(
    trace: RoutingTrace,
    points: Sequence[Mapping[str, Any]] = (),
    dense: float | None = None,
    notes: Sequence[str] = (),
    width: int = 960,
) -> str:
    """Tokens by layers, a full cell where the layer kept the token and a thin line where it did not.

    A long text goes on in further bands, at most as many as stay readable; the heading says if it was cut.

    Args:
        points: of `page.curve`, drawn below if there are two or more.
        dense: loss of a dense model on the text, a dashed line there.
        notes: lines to write below the text.
    """
    bands = _Bands(trace, width)
    lines = _lines(trace, int((width - LEFT - RIGHT) / MONO))
    top = 78
    below = top + len(bands.parts) * bands.height
    curves = list(points) if len(points) > 1 else []
    end = below + 34 + (len(lines) + len(notes)) * LINE_HEIGHT
    height = end + (230 if curves else 0)
    picture = Picture(width, height, f"Routing of {len(trace.tokens):,} tokens")
    picture.text(LEFT, 26, _heading(trace, bands.shown), INK, bold=True)
    _legend(picture, 48, trace)
    for index, part in enumerate(bands.parts):
        bands.draw(picture, part, top + index * bands.height)
    picture.text(LEFT, below + 12, "The text, darker where more routed layers keep a token", FAINT)
    for index, line in enumerate(lines):
        _text_line(picture, line, below + 22 + index * LINE_HEIGHT)
    for index, note in enumerate(notes):
        picture.text(LEFT, below + 40 + (len(lines) + index) * LINE_HEIGHT, note, FAINT)
    if curves:
        _curves(picture, curves, dense, end)
    return picture.svg()


def curve_svg(points: Sequence[Mapping[str, Any]], dense: float | None = None, width: int = 960) -> str:
    """K/V bytes and loss against p, side by side."""
    picture = Picture(width, 230, "What a threshold costs and buys")
    _curves(picture, points, dense, 0)
    return picture.svg()


def _heading(trace: RoutingTrace, shown: int) -> str:
    p, tokens = trace.thresholds, len(trace.tokens)
    parts = [f"p = {short(p[0])}" if np.ptp(p) == 0 else f"p = {short(p.min())} to {short(p.max())}"]
    parts += [f"kept {100 * trace.keep.mean():.1f} %", f"KV cache {trace.kv_saving:.2f}x smaller"]
    if bits := KV_BITS.get(trace.kv_cache_dtype):
        parts.append(f"keys and values in {bits}")
    if np.isfinite(trace.mean_loss):
        parts.append(f"loss {trace.mean_loss:.3f} nats a token")
    parts.append(f"{tokens:,} tokens" + (f", the first {shown:,} shown" if shown < tokens else ""))
    return "  ·  ".join(([trace.model] if trace.model else []) + parts)


def _legend(picture: Picture, y: float, trace: RoutingTrace) -> None:
    x, said = float(LEFT), words(trace.skip)
    samples = [
        (colour_of(0.8), 11.0, f"{said['legend_kept']}, darker: higher gate"),
        (LINE, 2.0, said["legend_left"]),
    ]
    if len(set(trace.layers)) < trace.num_layers:
        samples.append((DENSE, 11.0, "dense layer"))
    for colour, height, text in samples:
        picture.rect(x, y - 5 - height / 2, 20, height, colour)
        picture.text(x + 27, y, text, FAINT)
        x += 27 + 6.6 * len(text) + 26


class _Bands:
    """The heatmap, cut into parts that fit the width, one below the other."""

    def __init__(self, trace: RoutingTrace, width: int) -> None:
        self.trace, room = trace, width - LEFT - RIGHT
        tokens = len(trace.tokens)
        self.cell_w = float(np.clip(room / tokens, 6, 22))
        self.lanes = _lanes(trace)
        self.cell_h = float(np.clip(190 / len(self.lanes), 2.5, 16))
        self.height = round(len(self.lanes) * self.cell_h) + 36
        count = max(1, int(room // self.cell_w))
        bands = max(1, min(-(-tokens // count), 440 // self.height or 1))
        self.shown = min(tokens, bands * count)
        count = -(-self.shown // bands)  # bands of one width
        self.parts = [range(i, min(i + count, tokens)) for i in range(0, self.shown, count)]

    def draw(self, picture: Picture, part: range, top: float) -> None:
        end = LEFT + len(part) * self.cell_w
        boxes: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
        self._labels(picture, end, top)
        for lane, (layer, row) in enumerate(self.lanes):
            # Low lines of one layer touch: what lies between two is between two layers.
            gap = 1.0 if self.cell_h >= 5 else 0.6 * (lane == 0 or self.lanes[lane - 1][0] != layer)
            y, height = top + lane * self.cell_h + gap, self.cell_h - gap * (2 if self.cell_h >= 5 else 1)
            if row is None:
                boxes[DENSE].append((LEFT, y, len(part) * self.cell_w - 1, height))
            else:
                self._cells(row, part, (y, height), boxes)
        for colour, found in boxes.items():
            picture.rects(colour, found)
        bottom = top + len(self.lanes) * self.cell_h
        step = next((s for s in (5, 10, 20, 50, 100) if s * self.cell_w >= 60), 200)
        for column, t in enumerate(part):
            if t % step == 0:
                picture.text(LEFT + (column + 0.5) * self.cell_w, bottom + 15, f"{t:,}", FAINT, 0.5)
        picture.text(LEFT - 8, bottom + 15, "layer", FAINT, 1.0)

    def _labels(self, picture: Picture, end: float, top: float) -> None:
        """Number and keep ratio of every layer, or of as many as there is room for."""
        last = -12.0
        for layer in range(self.trace.num_layers):
            of = [(lane, row) for lane, (other, row) in enumerate(self.lanes) if other == layer]
            base = (of[0][0] + len(of) / 2) * self.cell_h + 4
            if base - last < 12:
                continue
            last, rows = base, [row for _, row in of if row is not None]
            kept = f"{100 * self.trace.keep[rows].mean():.0f} %" if rows else "dense"
            picture.text(LEFT - 8, top + base, str(layer), INK if rows else FAINT, 1.0)
            picture.text(end + 8, top + base, kept, FAINT)

    def _cells(self, row: int, part: range, across: tuple[float, float], boxes: dict[str, list[Any]]) -> None:
        y, height = across
        lines: list[tuple[float, float, float, float]] = []  # of skipped tokens; neighbours share one
        for column, t in enumerate(part):
            x = LEFT + column * self.cell_w
            if self.trace.keep[row, t]:
                shade = round(float(self.trace.gate[row, t]) * SHADES) / SHADES
                boxes[colour_of(shade)].append((x, y, self.cell_w - 1, height))
            else:
                thin = min(1.6, height / 3)
                left = x if not lines or lines[-1][0] + lines[-1][2] < x - 0.01 else lines.pop()[0]
                lines.append((left, y + (height - thin) / 2, x + self.cell_w - left, thin))
        boxes[LINE] += lines


def _lanes(trace: RoutingTrace) -> list[tuple[int, int | None]]:
    """(layer, row of the trace) of each line that is drawn: one a gate; one of no row for other layers."""
    found: list[tuple[int, int | None]] = []
    for layer in range(trace.num_layers):
        rows = [row for row, of in enumerate(trace.layers) if of == layer]
        found += [(layer, row) for row in rows] or [(layer, None)]
    return found


Piece = tuple[str, float]  # text, share of the routed layers that keep it


def _lines(trace: RoutingTrace, room: int) -> list[list[Piece]]:
    """The beginning of the text in lines of at most `room` letters."""
    lines: list[list[Piece]] = [[]]
    used = 0
    for token, share in zip(trace.tokens, trace.keep.mean(axis=0), strict=True):
        pieces = token.replace("\t", "    ").split("\n")
        for index, piece in enumerate(pieces):
            if index or used + columns(piece) > room:
                lines.append([])
                used = 0
            lines[-1].append((piece[:room], float(share)))
            used += columns(piece[:room])
        if len(lines) > LINES:
            return [*lines[:LINES], [("…", 0.0)]]
    return lines


def _text_line(picture: Picture, line: list[Piece], y: float) -> None:
    x = float(LEFT)
    for text, share in line:
        width = columns(text) * MONO
        if share and text:
            picture.rect(x, y, width, LINE_HEIGHT - 3, blue(share))
        picture.code(x, y + 13, text, "#ffffff" if share > 0.75 else INK)
        x += width


def _curves(picture: Picture, points: Sequence[Mapping[str, Any]], dense: float | None, top: float) -> None:
    drawn = [("kv_bytes", "KV cache of this text"), ("loss", "loss, nats a token")]
    if all(d.get("recall") is not None for d in points):
        drawn.append(("recall", "loss on repeated passages"))
    each = (picture.width - 20) // len(drawn)
    for index, (key, title) in enumerate(drawn):
        line = [(float(d["p"]), float(d[key])) for d in points]
        room, loss = list(line), key != "kv_bytes"
        if key == "loss" and dense is not None:
            room.append((line[0][0], dense))
        axes = Axes(
            picture,
            (85 + index * each, top + 40, each - 110, 130),
            room,
            LEAST_LOSS if loss else 0.0,
            not loss,
            None if loss else byte_text,
        )
        axes.frame(title, "threshold p")
        if key == "loss" and dense is not None:
            axes.level(dense, "dense model")
        axes.line(line, dots=True)
