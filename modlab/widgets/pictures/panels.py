"""Still pictures of the panels: generations side by side, frontier, training curves, token classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modlab.widgets.pictures.png import (
    ACCENT,
    FAINT,
    INK,
    LINE,
    Picture,
    colour_of,
    short,
)

WORSE = (217, 115, 13)


def compare_png(sides: Sequence[Mapping[str, Any]], width: int = 960) -> bytes:
    """One strip of tokens a side: full where the other side has the token too, marked where it differs."""
    picture = Picture(width, 60 + 50 * max(1, len(sides)))
    if not sides:
        picture.text(20, 20, "NOTHING GENERATED YET. RUN THE CELL FOR THE LIVE VIEW.", FAINT)
    for index, side in enumerate(sides):
        y, pieces = 20 + 50 * index, side["pieces"]
        differ = sum(not s for s in side["same"])
        picture.text(
            20,
            y,
            f"P = {side['p']:.3g}   {len(pieces)} TOKENS, {differ} DIFFER   KV {short(side['kv_bytes'])}B",
        )
        each = min(16.0, (width - 40) / max(1, len(pieces)))
        for t, same in enumerate(side["same"]):
            picture.rect(20 + t * each, y + 16, each - 1, 18, (200, 206, 212) if same else WORSE)
    if sides:
        y = 24 + 50 * len(sides)
        picture.rect(20, y, 20, 11, WORSE)
        picture.text(48, y, "TOKENS THAT THE OTHER SIDE DOES NOT HAVE", FAINT)
    return picture.png()


def frontier_png(
    points: Sequence[Mapping[str, float]],
    references: Sequence[Mapping[str, Any]],
    metric: str,
    p: float,
    width: int = 960,
) -> bytes:
    """Loss against the metric; the point nearest to p is ringed."""
    others = [d for d in references if metric in d and "loss" in d]
    axes = _Axes(Picture(width, 380), [*points, *others], metric, "loss", 90, 40, width - 130, 280)
    names = {"kv_bytes": "KV BYTES", "prefill_ms": "PREFILL MS", "decode_ms": "DECODE MS A TOKEN"}
    axes.frame(f"LOSS BY {names.get(metric, metric)}")
    axes.line([(d[metric], d["loss"]) for d in points], ACCENT)
    for d in points:
        x, y = axes.at(d[metric], d["loss"])
        axes.picture.rect(x - 3, y - 3, 6, 6, ACCENT)
        axes.picture.text(x + 8, y - 12, f"P {d['p']:.2g}", FAINT)
    for d in others:
        x, y = axes.at(d[metric], d["loss"])
        axes.picture.rect(x - 5, y - 5, 10, 10, WORSE)
        axes.picture.text(x - 10, y - 4, str(d["name"]), INK, 1)
    nearest = min(points, key=lambda d: abs(d["p"] - p))
    x, y = axes.at(nearest[metric], nearest["loss"])
    for w, h, dx, dy in ((16, 2, -8, -8), (16, 2, -8, 6), (2, 16, -8, -8), (2, 16, 6, -8)):
        axes.picture.rect(x + dx, y + dy, w, h, INK)
    return axes.picture.png()


def training_png(columns: Mapping[str, Any], width: int = 960) -> bytes:
    """Loss and keep ratios by step."""
    picture = Picture(width, 240)
    steps = columns.get("step")
    if steps is None or not len(steps):
        picture.text(20, 20, "NO STEP WAS LOGGED YET. RUN THE CELL FOR THE LIVE VIEW.", FAINT)
        return picture.png()
    half = width // 2 - 110
    for names, title, x in (
        (["loss", "eval_loss"], "LOSS BY STEP", 80),
        ([c for c in columns if c.startswith("keep_")], "KEPT BY STEP", width // 2 + 70),
    ):
        lines = {
            n: [(s, v) for s, v in zip(steps, columns[n], strict=True) if np.isfinite(v)]
            for n in names
            if n in columns
        }
        dots = [{"x": s, "y": v} for line in lines.values() for s, v in line]
        if not dots:
            continue
        axes = _Axes(picture, dots, "x", "y", x, 20, half, 160)
        axes.frame(title)
        for name, line in lines.items():
            axes.line(
                line, WORSE if name == "eval_loss" else ACCENT if name in ("loss", "keep_ratio") else LINE
            )
    return picture.png()


def classes_png(
    layers: Sequence[int],
    classes: Sequence[Mapping[str, Any]],
    positions: Sequence[Mapping[str, Any]],
    width: int = 960,
) -> bytes:
    """Two tables of keep ratios in per cent."""
    row = 22
    picture = Picture(width, 110 + row * (len(classes) + len(positions)))
    left = 250
    each = min(64.0, (width - left - 20) / max(1, len(layers)))
    y = 16
    for title, rows in (("KEPT IN %, BY CLASS", classes), ("BY POSITION", positions)):
        picture.text(20, y, title)
        for column, layer in enumerate(layers):
            picture.text(left + (column + 0.5) * each, y, str(layer), FAINT, 0.5)
        y += 16
        for item in rows:
            picture.text(20, y + 6, item["name"][:16])
            picture.text(left - 12, y + 6, f"{item['tokens']}", FAINT, 1)
            for column, kept in enumerate(item["kept"]):
                if kept is None:
                    continue
                colour = colour_of(kept)
                picture.rect(left + column * each, y, each - 1, row - 1, colour)
                ink = (255, 255, 255) if sum(colour) < 380 else (0, 0, 0)
                if each >= 28:
                    picture.text(left + (column + 0.5) * each, y + 6, f"{100 * kept:.0f}", ink, 0.5)
            y += row
        y += 20
    return picture.png()


class _Axes:
    """A rectangle of the picture with two scales."""

    def __init__(
        self,
        picture: Picture,
        dots: Sequence[Mapping[str, Any]],
        x_name: str,
        y_name: str,
        left: int,
        top: int,
        width: int,
        height: int,
    ) -> None:
        self.picture, self.left, self.top, self.width, self.height = picture, left, top + 20, width, height
        xs, ys = [float(d[x_name]) for d in dots], [float(d[y_name]) for d in dots]
        self.x0, self.y0 = min(xs), min(ys)
        self.x1, self.y1 = max(xs), max(ys)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x0) / ((self.x1 - self.x0) or 1)
        up = (y - self.y0) / ((self.y1 - self.y0) or 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def frame(self, title: str) -> None:
        """Title, axes, and the ends of both scales."""
        p = self.picture
        p.text(self.left, self.top - 20, title)
        p.rect(self.left, self.top + self.height, self.width, 1, FAINT)
        p.rect(self.left, self.top, 1, self.height, FAINT)
        for value, y in ((self.y1, self.top), (self.y0, self.top + self.height)):
            p.text(self.left - 6, y - 5, short(value), FAINT, 1)
        for value, x in ((self.x0, self.left), (self.x1, self.left + self.width)):
            p.text(x, self.top + self.height + 6, short(value), FAINT, 0.5)

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        """A polyline."""
        at = [self.at(x, y) for x, y in points]
        for (x0, y0), (x1, y1) in zip(at, at[1:], strict=False):
            self.picture.line(x0, y0, x1, y1, colour)
