"""Still pictures of the panels: generations side by side, frontier, training curves, token classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modlab.widgets.pictures.axes import LEAST_LOSS, Axes, byte_text, short
from modlab.widgets.pictures.svg import (
    ACCENT,
    FAINT,
    INK,
    LINE,
    MONO,
    WORSE,
    Picture,
    colour_of,
    columns,
    ink_on,
)

ROOM = 126  # letters of a line of generated text
LINES = 8  # of each side, at most


def compare_svg(sides: Sequence[Mapping[str, Any]], width: int = 960) -> str:
    """What each side wrote, with what the other side does not have marked."""
    if not sides:
        picture = Picture(width, 50, "Nothing generated yet")
        picture.text(20, 30, "Nothing was generated yet: run the cell for the live view.", FAINT)
        return picture.svg()
    written = [_written(side) for side in sides]
    picture = Picture(width, 40 + sum(44 + 18 * len(lines) for lines in written), "Side by side")
    y = 30.0
    for side, lines in zip(sides, written, strict=True):
        differ = sum(not same for same in side["same"])
        told = f"{len(side['pieces'])} tokens, {differ} differ  ·  KV cache {byte_text(side['kv_bytes'])}"
        picture.text(20, y, f"p = {short(side['p'])}  ·  {told}", INK, bold=True)
        for index, line in enumerate(lines):
            _mark_line(picture, line, y + 20 + 18 * index)
        y += 44 + 18 * len(lines)
    picture.rect(20, y - 12, 20, 11, WORSE)
    picture.text(48, y - 2, "tokens that the other side does not have", FAINT)
    return picture.svg()


def _written(side: Mapping[str, Any]) -> list[list[tuple[str, bool]]]:
    """The continuation in lines of (text, whether the other side has it)."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0
    for piece, same in zip(side["pieces"], side["same"], strict=True):
        for index, text in enumerate(piece.replace("\t", "    ").split("\n")):
            if index or used + columns(text) > ROOM:
                lines.append([])
                used = 0
            lines[-1].append((text, same))
            used += columns(text)
    return lines if len(lines) <= LINES else [*lines[:LINES], [("…", True)]]


def _mark_line(picture: Picture, line: list[tuple[str, bool]], y: float) -> None:
    x = 20.0
    for text, same in line:
        width = columns(text) * MONO
        if not same and text:
            picture.rect(x, y - 12, width, 15, "#f7d9bf")
            picture.rect(x, y + 2, width, 1.5, WORSE)
        picture.code(x, y, text)
        x += width


UNITS: dict[str, Callable[[float], str]] = {"bytes": byte_text, "share": lambda x: f"{x:.0%}"}


def frontier_svg(
    line: Mapping[str, Any], at: float, quality: str = "", time: str = "", width: int = 960
) -> str:
    """A line of the frontier (`widgets/frontier_lines.py`): what is lost over memory, and over time if there
    is one; the point nearest to `at` is ringed.

    Args:
        quality, time: keys of the axes; by default the line's first.
    """
    lost = _axis(line["qualities"], quality)
    memory = next(axis for axis in line["costs"] if axis["unit"] != "ms")
    times = [axis for axis in line["costs"] if axis["unit"] == "ms"]
    costs = [memory, *([_axis(times, time)] if times else [])]
    picture, each = Picture(width, 390, "What it costs and buys"), (width - 40) / len(costs)
    for index, cost in enumerate(costs):
        _frontier_panel(picture, (90 + index * each, 46, each - 130, 280), line, at, cost, lost)
    return picture.svg()


def _axis(axes: Sequence[Mapping[str, str]], key: str) -> Mapping[str, str]:
    return next((axis for axis in axes if axis["key"] == key), axes[0])


def _frontier_panel(
    picture: Picture,
    box: tuple[float, float, float, float],
    line: Mapping[str, Any],
    at: float,
    cost: Mapping[str, str],
    lost: Mapping[str, str],
) -> None:
    """What is lost over one cost."""
    points, over, down = line["points"], cost["key"], lost["key"]
    others = [d for d in line["references"] if over in d and down in d]
    places = [(float(d[over]), float(d[down])) for d in points]
    room = [*places, *((float(d[over]), float(d[down])) for d in others)]
    form, form_y = UNITS.get(cost["unit"], short), UNITS.get(lost["unit"], short)
    axes = Axes(picture, box, room, LEAST_LOSS if down == "loss" else 0.02, form=form_y, form_x=form)
    axes.frame(lost["title"], f"{cost['title'].partition(':')[0]} (left is better)")
    axes.line(places, dots=True)
    for d, place in zip(points, places, strict=True):
        x, y = axes.at(*place)
        picture.text(
            x + 8, y - 8, f"p {d['at']:.2g}" if line["dial"] == "threshold" else f"{d['at']:.3g}x", FAINT
        )
    for d in others:
        x, y = axes.at(float(d[over]), float(d[down]))
        picture.rect(x - 5, y - 5, 10, 10, WORSE)
        picture.text(x - 10, y + 4, str(d["name"]), INK, 1.0)
    nearest = min(points, key=lambda d: abs(d["at"] - at))
    x, y = axes.at(nearest[over], nearest[down])
    picture.ring(x - 8, y - 8, 16, 16)


def training_svg(columns_: Mapping[str, Any], width: int = 960) -> str:
    """Loss and keep ratios by step."""
    steps = columns_.get("step")
    if steps is None or not len(steps):
        picture = Picture(width, 50, "No step was logged yet")
        picture.text(20, 30, "No step was logged yet: run the cell for the live view.", FAINT)
        return picture.svg()
    picture = Picture(width, 260, "Training")
    half = width // 2 - 120
    for names, title, x, least in (
        (["loss", "eval_loss"], "loss, nats a token", 80, LEAST_LOSS),
        ([c for c in columns_ if c.startswith("keep_")], "kept", width // 2 + 80, 0.0),
    ):
        lines = {
            n: [(float(s), float(v)) for s, v in zip(steps, columns_[n], strict=True) if np.isfinite(v)]
            for n in names
            if n in columns_
        }
        dots = [dot for line in lines.values() for dot in line]
        if not dots:
            continue
        axes = Axes(picture, (x, 46, half, 150), dots, least)
        axes.frame(title, "step")
        for name, line in lines.items():
            if line:
                own = ACCENT if name in ("loss", "keep_ratio") else LINE
                axes.line(line, WORSE if name == "eval_loss" else own)
    return picture.svg()


def classes_svg(
    layers: Sequence[int],
    classes: Sequence[Mapping[str, Any]],
    positions: Sequence[Mapping[str, Any]],
    width: int = 960,
) -> str:
    """Two tables of keep ratios in per cent."""
    row, left = 22, 250
    picture = Picture(width, 100 + row * (len(classes) + len(positions)), "Which tokens are kept")
    each = min(64.0, (width - left - 20) / max(1, len(layers)))
    y = 28.0
    for title, rows in (("kept in %, by class of token", classes), ("by position", positions)):
        picture.text(20, y, title, INK, bold=True)
        for column, layer in enumerate(layers):
            picture.text(left + (column + 0.5) * each, y, str(layer), FAINT, 0.5)
        y += 8
        for item in rows:
            picture.text(20, y + 15, item["name"])
            picture.text(left - 12, y + 15, f"{item['tokens']:,}", FAINT, 1.0)
            for column, kept in enumerate(item["kept"]):
                if kept is None:
                    continue
                picture.rect(left + column * each, y, each - 1, row - 1, colour_of(kept))
                if each >= 28:
                    middle = left + (column + 0.5) * each
                    picture.text(middle, y + 15, f"{100 * kept:.0f}", ink_on(kept), 0.5)
            y += row
        y += 30
    return picture.svg()
