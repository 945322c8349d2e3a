"""How times grow with context, batch and keep ratio: pictures and a sentence.

From what `modlab bench growth` wrote, of whole layers (docs/speed.png) and of K/V routing
(docs/speed_kv.png).
"""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from scripts.pages.results import joined, results, runs, skipped
from scripts.pages.screenshot import save_png

WIDTH, HEIGHT = 1000, 420
CONTEXT = 32768
BATCH_CONTEXT = 8192
KEEP_RATIO = 0.10
COLOURS = {"prefill": "#0072b2", "decode": "#d55e00"}  # told apart by colour-blind people
PICTURES = {"layer": "speed.png", "kv": "speed_kv.png"}
"""By what a skipped token leaves out."""

Panel = tuple[str, str, list[dict[str, Any]]]
"""Axis, title, rows."""


def grown(root: Path, skip: str) -> dict[str, Any] | None:
    """The newest rows of a skip, of all runs (`--only` measures in parts) on the device of the newest one."""
    found = [result for result in results(root) if result["what"] == "growth" and skipped(result) == skip]
    found.sort(key=lambda result: str(result["date"]))
    of = [result for result in found if result["device_name"] == found[-1]["device_name"]]
    return joined(of) if of else None


def panels(result: dict[str, Any]) -> list[Panel]:
    """Speed-up over keep ratio at one context, over context and over batch at one keep ratio; of the batch
    only where a decoding step was measured with several rows."""
    one = [row for row in result["rows"] if row["batch"] == 1]
    few = [row for row in result["rows"] if round(row["keep_ratio"], 2) == KEEP_RATIO]
    by_batch = [row for row in few if row["context"] == BATCH_CONTEXT and row["case"] == "decode"]
    found = [
        ("keep_ratio", f"{CONTEXT:,} tokens of context", [r for r in one if r["context"] == CONTEXT]),
        ("context", f"{KEEP_RATIO:.0%} kept in routed layers", [row for row in few if row["batch"] == 1]),
    ]
    if len({row["batch"] for row in by_batch}) > 1:
        found.append(("batch", f"{KEEP_RATIO:.0%} kept, rows of {BATCH_CONTEXT:,}", by_batch))
    return found


def figure(result: dict[str, Any]) -> go.Figure:
    """Speed-up over dense in each of the `panels`, with ideals."""
    shown = panels(result)
    drawing = make_subplots(
        cols=len(shown), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=[p[1] for p in shown]
    )
    for column, (axis, _, chosen) in enumerate(shown, 1):
        for case, colour in COLOURS.items():
            points = sorted((row for row in chosen if row["case"] == case), key=lambda row: row[axis])
            for key, dash, name in (("speedup", "solid", case), ("ideal", "dot", f"{case}, ideal")):
                drawing.add_scatter(
                    x=[row[axis] for row in points],
                    y=[row[key] for row in points],
                    name=name,
                    mode="lines+markers" if key == "speedup" else "lines",
                    line={"color": colour, "dash": dash},
                    showlegend=column == 1,
                    row=1,
                    col=column,
                )
    drawing.add_hline(y=1.0, line_width=1, line_color="grey")
    drawing.update_xaxes(title_text="keep ratio of routed layers", tickformat=".0%", col=1)
    for column, title, name in ((2, "tokens of context", "context"), (3, "rows of a batch", "batch")):
        if column <= len(shown):
            values = sorted({row[name] for row in shown[column - 1][2]})
            text = [f"{n // 1024}k" if name == "context" else str(n) for n in values]
            drawing.update_xaxes(title_text=title, type="log", tickvals=values, ticktext=text, col=column)
    drawing.update_yaxes(title_text="speed-up over dense", col=1)
    first = result["rows"][0]
    what = ", keys and values alone" if skipped(result) == "kv" else ""
    drawing.update_layout(
        title=f"{first['shape']}, {first['routed_layers']} of {first['num_layers']} layers routed{what}, "
        f"{result['device_name']}, {result['dtype']}, {result['date'][:10]}",
        template="plotly_white",
        font={"family": "sans-serif", "size": 13},
        legend={"orientation": "h", "y": -0.2},
        width=WIDTH,
        height=HEIGHT,
        margin={"t": 90, "r": 20},
    )
    return drawing


def draw(docs: Path) -> list[Path]:
    """Draws a picture of each skip that was measured into `docs`; returns their paths."""
    drawn = []
    for skip, name in PICTURES.items():
        result = grown(docs.parent, skip)
        if result is not None:
            save_png(figure(result), docs / name, WIDTH, HEIGHT)
            drawn.append(docs / name)
    if not drawn:
        raise SystemExit("no growth result is committed: modlab bench growth")
    return drawn


def block(root: Path) -> str:
    """How times grow where keys and values alone are routed."""
    result = grown(root, "kv")
    if result is None:
        return "How times grow where keys and values alone are routed has not been measured yet."
    costs = [_cost(row) for row in result["rows"] if "kept_us" in row and row["keep_ratio"] == 1.0]
    return "\n\n".join(
        [
            f"Where keys and values alone are routed, {runs(result['of'])}",
            f"![The same of K/V routing, with the ideal]({PICTURES['kv']})",
            *(["Fitted over the keep ratios, " + "; ".join(costs) + "."] if costs else []),
        ]
    )


def _cost(row: dict[str, Any]) -> str:
    return (
        f"{row['case']} at {row['context']:,} tokens: a token takes a layer {row['kept_us']:.2f} us where "
        f"all are kept, {row['skipped_us']:.2f} us where none is"
    )
