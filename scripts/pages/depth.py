"""The depth section of docs/quality.md and its pictures, from benchmarks/results/depth_*.json.

Results for one model on one device, in rows of one length, are one table; of an arm (and seed) that several
have the newest counts. Without a result the section says so.
"""

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from scripts.pages.quality import HEIGHT, WIDTH, number
from scripts.pages.screenshot import save_png

FAMILIES = {  # colours told apart by colour-blind people; a shape for each, too
    "leave": ("#0072b2", "circle"),
    "kv+leave": ("#56b4e9", "hexagon"),
    "written": ("#009e73", "diamond"),
    "sublayers": ("#e69f00", "triangle-up"),
    "mlp": ("#d55e00", "square"),
    "static": ("#999999", "cross"),
    "paper": ("#cc79a7", "x"),
    "topk": ("#000000", "star"),
}
NONE = "No result of `python -m benchmarks.depth` is committed yet."


def joined(root: Path) -> list[dict[str, Any]]:
    """Of each model, device and length: `rows`, `prefill`, and the results that they are `of`, oldest
    first."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("depth_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result["rows"]:  # times alone
            continue
        first = result["rows"][0]
        found.setdefault((first["model"], result["device_name"], first["length"]), []).append(result)
    return [join(found[key]) for key in sorted(found)]


def join(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one, with rows of all that have any in it."""
    results = sorted(results, key=lambda result: str(result["date"]))
    rows = {(row["arm"], row.get("seed", 0)): row for result in results for row in result["rows"]}
    prefill = [time for result in results for time in result.get("prefill", [])]
    of = [result for result in results if any(row in rows.values() for row in result["rows"])]
    return {"rows": list(rows.values()), "prefill": prefill, "of": of, "device_name": of[0]["device_name"]}


def family(arm: str) -> str:
    """What kind of arm it is: the first word of its name."""
    return arm.split("-")[0]


def block(root: Path) -> str:
    """The section's text."""
    results = joined(root)
    return "\n\n".join(section(result) for result in results) if results else NONE


def section(result: dict[str, Any]) -> str:
    """One model: where the figures come from, then a row an arm."""
    rows = sorted(result["rows"], key=lambda row: (row["compute"], row["kl_far"]))
    first = rows[0]
    lines = [
        f"### {first['model']} on {result['device_name']}",
        "",
        " ".join(
            f"{one['dtype']}, torch {one['versions']['torch']}, {one['date'][:10]}. Made by "
            f"`{one['command']}`.{_note(one)}"
            for one in result["of"]
        ),
        "",
        f"Compute is the share of the layers' operations that a prompt of {first['length']:,} tokens "
        "executes, K/V the dense model's keys and values over those stored, KL that to the dense model at "
        f"positions from {first['far_from']:,} on, mean of three texts, recall the loss on the second copy "
        f"of a passage above the dense model's, at distances of {_distances(first)} tokens, retrieval, "
        "at the same distances, that of dense's answers. Tasks: mean score, the dense model's, and the "
        "standard error of the paired difference."
        f"{_timed(result)}",
        "",
        "| arm | tokens | compute asked / got | K/V | KL | recall | retrieval, of dense's "
        "| tasks against dense | prompt |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gaps = " ".join(f"{gap:+.3f}" for gap in row["recall_gap"].values())
        found = " ".join(f"{share:.2f}" for share in row.get("retrieval_of_dense", {}).values()) or "-"
        ratio, speed = row.get("ratio"), row.get("prefill_speedup")
        lines.append(
            f"| {row['arm']} | {row['tokens'] / 1e6:.3g}M | {number(row.get('compute_asked'), '.2f')} / "
            f"{row['compute']:.3f} | {'-' if ratio is None else f'{ratio:.2f}x'} | {row['kl_far']:.3f} | "
            f"{gaps} | {found} | {_tasks(row)} | {'-' if speed is None else f'{speed:.2f}x'} |"
        )
    lines += [
        "",
        "Bars are from the best to the worst text, or one standard error of a paired difference; of "
        "open points nothing was trained.",
        "",
        f"![KL and tasks over operations and over a prompt's time, {first['model']}]({picture_name(result)})",
    ]
    return "\n".join(lines)


def _note(result: dict[str, Any]) -> str:
    return f" {result['note']}" if result.get("note") else ""


def _distances(row: dict[str, Any]) -> str:
    return ", ".join(f"{int(distance):,}" for distance in row["recall_gap"])


def _timed(result: dict[str, Any]) -> str:
    """What the column of prompts is about, where some were timed."""
    lengths = sorted({time["context"] for time in result.get("prefill", [])})
    if not lengths:
        return ""
    said = ", ".join(f"{length:,}" for length in lengths)
    return f" Prompt: a prompt of {said} tokens through `generate`, dense time over that of leaving."


def _tasks(row: dict[str, Any]) -> str:
    """The mean of the tasks: score, dense score, their quotient and the error of their difference."""
    mean = row["tasks"].get("mean")
    if mean is None:
        return "-"
    names = ", ".join(name for name in row["tasks"] if name != "mean")
    return (
        f"{mean['score']:.4f} of {mean['dense']:.4f} ({mean['score'] / mean['dense']:.1%}) "
        f"± {mean['gap_stderr']:.4f}{f': {names}' if names else ''}"
    )


def picture_name(result: dict[str, Any]) -> str:
    """The file of one model's picture."""
    row = result["rows"][0]
    return f"depth_{row['model']}_{row['length']}.png"


def figure(result: dict[str, Any]) -> go.Figure:
    """KL and, where they were asked, tasks over executed operations and, where a prompt was timed, over its
    time; a point an arm, an open one where nothing was trained. Bars: KL from the best to the worst text,
    tasks one standard error of the paired difference."""
    rows = result["rows"]
    places = [p for p in PLACES if any(p[1](row) is not None for row in rows)]
    values = [v for v in VALUES if any(v[1](row)[0] is not None for row in rows)]
    drawing = make_subplots(
        len(values), len(places), shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.05,
        vertical_spacing=0.06,
    )  # fmt: skip
    for name in dict.fromkeys(family(row["arm"]) for row in rows):
        colour, shape = FAMILIES[name]
        own = sorted((row for row in rows if family(row["arm"]) == name), key=lambda row: row["compute"])
        symbols = [shape if row["tokens"] else f"{shape}-open" for row in own]
        for column, (_, place) in enumerate(places, 1):
            for line, (_, value) in enumerate(values, 1):
                points = [
                    (place(row), *value(row), row["arm"], symbol)
                    for row, symbol in zip(own, symbols, strict=True)
                    if None not in (place(row), value(row)[0])
                ]
                if not points:
                    continue
                x, y, high, low, arms, drawn = zip(*points, strict=True)
                drawing.add_scatter(
                    x=x, y=y, error_y={"type": "data", "array": high, "arrayminus": low},
                    name=name, legendgroup=name, showlegend=(column, line) == (1, 1),
                    text=arms, mode="markers", marker={"symbol": drawn, "size": 10, "color": colour},
                    row=line, col=column,
                )  # fmt: skip
    for column, (title, _) in enumerate(places, 1):
        drawing.update_xaxes(range=[0.35, 1.05], tickformat=".0%", col=column)
        drawing.update_xaxes(title_text=title, row=len(values), col=column)
    for line, (title, value) in enumerate(values, 1):
        drawing.update_yaxes(title_text=title, row=line, col=1)
        drawing.update_yaxes(range=_range([value(row) for row in rows], "share" not in title), row=line)
        drawing.update_yaxes(tickformat=".1%" if "share" in title else "", row=line)
    drawing.update_layout(
        template="plotly_white", font={"family": "sans-serif", "size": 12}, width=WIDTH,
        height=HEIGHT * (1 + len(values)) // 2, margin={"t": 30},
    )  # fmt: skip
    return drawing


def _range(values: list[tuple[float | None, float, float]], from_zero: bool) -> list[float]:
    """Of an axis, with bars and a tenth of room: axes that share theirs find none by themselves."""
    shown = [(value, high, low) for value, high, low in values if value is not None]
    top, bottom = max(v + high for v, high, _ in shown), min(v - low for v, _, low in shown)
    room = (top - bottom) / 10 or 0.01
    return [0.0 if from_zero else bottom - room, top + room]


def _compute(row: dict[str, Any]) -> float | None:
    found: float = row["compute"]
    return found


def _time(row: dict[str, Any]) -> float | None:
    speed = row.get("prefill_speedup")
    return None if speed is None else 1 / speed


def _kl(row: dict[str, Any]) -> tuple[float, float, float]:
    """The mean of the texts, and how far it is to the worst and to the best."""
    texts = row["kl_far_by_text"].values()
    return row["kl_far"], max(texts) - row["kl_far"], row["kl_far"] - min(texts)


def _share_of_tasks(row: dict[str, Any]) -> tuple[float | None, float, float]:
    mean = row["tasks"].get("mean")
    if mean is None:
        return None, 0.0, 0.0
    error = mean["gap_stderr"] / mean["dense"]
    return mean["score"] / mean["dense"], error, error


PLACES = (
    ("executed operations, share of dense", _compute),
    ("time of a prompt, share of dense", _time),
)
VALUES = (("KL (nats a token)", _kl), ("tasks, share of dense", _share_of_tasks))
"""Titles of axes, and what of a row stands there."""


def draw(docs: Path) -> list[Path]:
    """Draws the pictures of the section into `docs`; returns their paths."""
    drawn = []
    for result in joined(docs.parent):
        drawn.append(docs / picture_name(result))
        drawing = figure(result)
        save_png(drawing, drawn[-1], WIDTH, drawing.layout.height)
    return drawn
