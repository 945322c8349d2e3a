"""The depth section of docs/quality.md and its pictures, from benchmarks/results/depth_*.json.

Of several results for one model on one device the newest counts. Without a result the section says so.
"""

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

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


def newest(root: Path) -> list[dict[str, Any]]:
    """The newest result of each model and device, by model."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("depth_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = (result["rows"][0]["model"], result["device_name"])
        latest[key] = max(latest.get(key, result), result, key=lambda found: found["date"])
    return [latest[key] for key in sorted(latest)]


def family(arm: str) -> str:
    """What kind of arm it is: the first word of its name."""
    return arm.split("-")[0]


def block(root: Path) -> str:
    """The section's text."""
    results = newest(root)
    return "\n\n".join(section(result) for result in results) if results else NONE


def section(result: dict[str, Any]) -> str:
    """One model: where the figures come from, then a row an arm."""
    rows = sorted(result["rows"], key=lambda row: (row["compute"], row["kl_far"]))
    first = rows[0]
    lines = [
        f"### {first['model']} on {result['device_name']}",
        "",
        f"{result['dtype']}, torch {result['versions']['torch']}, {result['date'][:10]}. Made by "
        f"`{result['command']}`.",
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
    if len(rows) > 2:
        lines += ["", f"![KL over compute, {first['model']}]({picture_name(result)})"]
    return "\n".join(lines)


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
    return f"depth_{result['rows'][0]['model']}.png"


def figure(result: dict[str, Any]) -> go.Figure:
    """KL over executed operations, a point an arm; bars are from the best to the worst text."""
    drawing = go.Figure()
    for name in dict.fromkeys(family(row["arm"]) for row in result["rows"]):
        colour, shape = FAMILIES[name]
        rows = sorted((r for r in result["rows"] if family(r["arm"]) == name), key=lambda r: r["compute"])
        low = [row["kl_far"] - min(row["kl_far_by_text"].values()) for row in rows]
        high = [max(row["kl_far_by_text"].values()) - row["kl_far"] for row in rows]
        drawing.add_scatter(
            x=[row["compute"] for row in rows],
            y=[row["kl_far"] for row in rows],
            error_y={"type": "data", "array": high, "arrayminus": low},
            name=name,
            text=[row["arm"] for row in rows],
            mode="markers",
            marker={"symbol": shape, "size": 10, "color": colour},
        )
    drawing.update_xaxes(title_text="executed operations of the layers, share of dense")
    drawing.update_yaxes(title_text="KL to the dense model (nats a token)", rangemode="tozero")
    drawing.update_layout(
        template="plotly_white", font={"family": "sans-serif", "size": 12}, width=WIDTH, height=HEIGHT
    )
    return drawing


def draw(docs: Path) -> list[Path]:
    """Draws the pictures of the section into `docs`; returns their paths."""
    drawn = []
    for result in newest(docs.parent):
        if len(result["rows"]) > 2:
            drawn.append(docs / picture_name(result))
            save_png(figure(result), drawn[-1], WIDTH, HEIGHT)
    return drawn
