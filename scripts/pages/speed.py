"""docs/speed.png, from the committed result of `modlab bench growth`."""

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from scripts.pages.screenshot import save_png

WIDTH, HEIGHT = 1000, 420
CONTEXT = 32768
KEEP_RATIO = 0.10
COLOURS = {"prefill": "#0072b2", "decode": "#d55e00"}  # told apart by colour-blind people


def figure(result: dict[str, Any]) -> go.Figure:
    """Speed-up over keep ratio at one context (left), over context at one keep ratio (right), with ideals."""
    rows = [row for row in result["rows"] if row["batch"] == 1]
    panels = (
        ("keep_ratio", [row for row in rows if row["context"] == CONTEXT]),
        ("context", [row for row in rows if round(row["keep_ratio"], 2) == KEEP_RATIO]),
    )
    titles = (f"{CONTEXT:,} tokens of context", f"{KEEP_RATIO:.0%} kept in routed layers")
    drawing = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=titles)
    for column, (axis, chosen) in enumerate(panels, 1):
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
    contexts = sorted({row["context"] for row in rows})
    ticks = {"tickvals": contexts, "ticktext": [f"{n // 1024}k" for n in contexts]}
    drawing.update_xaxes(title_text="tokens of context", type="log", **ticks, col=2)
    drawing.update_yaxes(title_text="speed-up over dense", col=1)
    routed, layers = rows[0]["routed_layers"], rows[0]["num_layers"]
    drawing.update_layout(
        title=f"{rows[0]['shape']}, {routed} of {layers} layers routed, {result['device_name']}, "
        f"{result['dtype']}, {result['date'][:10]}",
        template="plotly_white",
        font={"family": "sans-serif", "size": 13},
        legend={"orientation": "h", "y": -0.2},
        width=WIDTH,
        height=HEIGHT,
        margin={"t": 90, "r": 20},
    )
    return drawing


def draw(docs: Path) -> list[Path]:
    """Draws the picture into `docs`; returns its path."""
    files = sorted((docs.parent / "benchmarks" / "results").glob("growth_*.json"))
    if not files:
        raise SystemExit("no growth result is committed: modlab bench growth")
    save_png(figure(json.loads(files[-1].read_text(encoding="utf-8"))), docs / "speed.png", WIDTH, HEIGHT)
    return [docs / "speed.png"]
