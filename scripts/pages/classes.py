"""Which kinds of tokens routers keep in real models, and what each kind loses: in docs/quality.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from scripts.pages.quality import HEIGHT, WIDTH
from scripts.pages.screenshot import save_png

LEAST = 40
"""Tokens of a class that a row of the table and a bar stand for."""
COLOURS = {"novels": "#0072b2", "python": "#e69f00", "wikitext": "#009e73", "headers": "#cc79a7"}
PATTERNS = {"novels": "", "python": "/", "wikitext": "x", "headers": "."}
NONE = "No result of `python -m benchmarks.depth classes` is committed yet."


def newest(root: Path) -> list[dict[str, Any]]:
    """The newest result of each model's routers."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("classes_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = (result["model"], result["routers"])
        latest[key] = max(latest.get(key, result), result, key=lambda found: found["date"])
    return [latest[key] for key in sorted(latest)]


def block(root: Path) -> str:
    """The section's text."""
    results = newest(root)
    return "\n\n".join(map(section, results)) if results else NONE


def section(result: dict[str, Any]) -> str:
    """One model's routers: where the figures come from, a row a text and class, the picture."""
    aimed = f", set to {result['saving']:g}x" if result["saving"] else ""
    lines = [
        f"`{result['routers']}`{aimed}, on {result['model']}, {result['device_name']}, {result['dtype']}, "
        f"torch {result['versions']['torch']}, {result['date'][:10]}. Made by `{result['command']}`.",
        "",
        "Kept: share of the gates of all routed layers that keep the token, recent tokens apart. Losses in "
        "nats, of predicting tokens of the class; ± is a standard error over tokens. Classes of fewer than "
        f"{LEAST} tokens are left out. A class follows from the token's form "
        "(`modlab.traces.token_classes`), and a row of much punctuation is read as code, wikitext here too.",
        "",
        "| text | class | tokens | kept | loss, dense | lost beyond | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in shown(result):
        lines.append(
            f"| {row['text']} | {row['token_class']} | {row['tokens']:,} | {row['kept']:.2f} | "
            f"{row['dense_loss']:.3f} | {row['loss_excess']:+.4f} ± {row['loss_excess_stderr']:.4f} | "
            f"{row['kl']:.4f} |"
        )
    lines += ["", f"![Kept share and loss by class of token, {result['model']}]({picture_name(result)})"]
    return "\n".join(lines)


def shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with tokens enough."""
    return [row for row in result["rows"] if row["tokens"] >= LEAST]


def picture_name(result: dict[str, Any]) -> str:
    """The file of one model's picture."""
    return f"classes_{result['routers']}.png"


def figure(result: dict[str, Any]) -> go.Figure:
    """Kept share and what is lost by class, a bar a text; bars of errors are one standard error."""
    drawing = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    for text in dict.fromkeys(row["text"] for row in shown(result)):
        rows = [row for row in shown(result) if row["text"] == text]
        marker = {"color": COLOURS[text], "pattern": {"shape": PATTERNS[text]}}
        common = {
            "name": text,
            "legendgroup": text,
            "marker": marker,
            "x": [row["token_class"] for row in rows],
        }
        drawing.add_bar(y=[row["kept"] for row in rows], row=1, col=1, **common)
        errors = {"type": "data", "array": [row["loss_excess_stderr"] for row in rows]}
        drawing.add_bar(
            y=[row["loss_excess"] for row in rows], error_y=errors, showlegend=False, row=2, col=1, **common
        )
    drawing.update_yaxes(title_text="kept", tickformat=".0%", rangemode="tozero", row=1, col=1)
    drawing.update_yaxes(title_text="lost beyond dense (nats)", row=2, col=1)
    drawing.update_layout(
        template="plotly_white", font={"family": "sans-serif", "size": 12}, width=WIDTH, height=HEIGHT
    )
    return drawing


def draw(docs: Path) -> list[Path]:
    """Draws the pictures of the section into `docs`; returns their paths."""
    drawn = []
    for result in newest(docs.parent):
        drawn.append(docs / picture_name(result))
        save_png(figure(result), drawn[-1], WIDTH, HEIGHT)
    return drawn
