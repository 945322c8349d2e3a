"""docs/quality.md and its pictures, from the newest benchmarks/results/quality_*.json."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from benchmarks.quality.arms import ARMS
from scripts.pages.screenshot import save_png

WIDTH, HEIGHT = 1000, 560
POINTS = ("1.3x", "1.5x", "1.8x", "2.2x", "2.5x")
PLAIN = "kv-mid"  # the arm that is MoDConfig()
MOST = 0.5  # nats at the top of the pictures; the tables have what lies beyond
AXES = {
    "kv_saving": "K/V bytes, dense over routed",
    "flops_share": "executed operations, share of dense",
}
FAMILIES = {  # colours told apart by colour-blind people; a shape for each, too
    "paper": ("#cc79a7", "x"),
    "topk": ("#d55e00", "square"),
    "static": ("#999999", "cross"),
    "random": ("#999999", "star"),
    "layer": ("#0072b2", "circle"),
    "attn": ("#009e73", "diamond"),
    "mlp": ("#e69f00", "triangle-up"),
    "kv": ("#56b4e9", "hexagon"),
    "dense": ("#000000", "line-ew"),
}


def newest_result(root: Path) -> dict[str, Any]:
    """The study's committed result."""
    files = sorted((root / "benchmarks" / "results").glob("quality_*.json"))
    if not files:
        raise SystemExit("no quality result is committed: python -m benchmarks.quality report")
    result: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return result


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of runs (seeds, bases) of each arm, budget and point."""
    keys = ["arm", "tokens", "point"]
    measures = [
        "gap",
        "kv_saving",
        "flops_share",
        "keep_ratio",
        "recall_gap",
        "asked_keep_ratio",
        "gap_to_base",
    ]
    rows = rows.reindex(columns=[*keys, *measures]).astype(dict.fromkeys(measures, float))
    groups = rows.groupby(keys, sort=False)
    out = groups[measures].mean()
    out["gap_sd"] = groups["gap"].std()
    out["runs"] = groups.size()
    return out.reset_index()


def figure(table: pd.DataFrame, axis: str) -> go.Figure:
    """Loss gap over one of the costs: a line an arm, through its operating points."""
    drawing = go.Figure()
    for arm, points in table.groupby("arm", sort=False):
        colour, shape = FAMILIES[str(arm).split("-")[0]]
        points = points.sort_values(axis)
        trained = points.point == "trained"
        drawing.add_scatter(
            x=points[axis],
            y=points.gap,
            error_y={"type": "data", "array": points.gap_sd, "visible": bool(points.gap_sd.notna().any())},
            name=str(arm),
            mode="lines+markers",
            line={"color": colour, "width": 1},
            marker={"symbol": shape, "size": [11 if t else 6 for t in trained], "color": colour},
        )
    drawing.update_xaxes(title_text=AXES[axis])
    drawing.update_yaxes(
        title_text="loss above dense continuation (nats a token)",
        range=[-0.02, min(MOST, table.gap.max() * 1.1)],
    )
    drawing.update_layout(
        template="plotly_white",
        font={"family": "sans-serif", "size": 12},
        width=WIDTH,
        height=HEIGHT,
        margin={"t": 30, "r": 20},
    )
    return drawing


def number(value: Any, form: str = ".4f") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None or value != value else format(value, form)


def trained_table(table: pd.DataFrame) -> list[str]:
    """Each arm where its training ended."""
    lines = [
        "| arm | what it tells | runs | KV saving | FLOPs | gap | recall gap | keep asked / got |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table[table.point == "trained"].sort_values("gap").itertuples():
        spread = f" ± {row.gap_sd:.4f}" if row.runs > 1 else ""
        why = ARMS[row.arm].why if row.arm in ARMS else ""
        lines.append(
            f"| {row.arm} | {why} | {row.runs} | {row.kv_saving:.2f}x | {row.flops_share:.2f} | "
            f"{number(row.gap)}{spread} | {number(row.recall_gap)} | "
            f"{number(row.asked_keep_ratio, '.3f')} / {row.keep_ratio:.3f} |"
        )
    return lines


def moved_table(table: pd.DataFrame, value: str = "gap") -> list[str]:
    """Each arm's gap with its thresholds moved to the same savings."""
    lines = ["| arm | " + " | ".join(POINTS) + " |", "|---" * (len(POINTS) + 1) + "|"]
    wide = table[table.point.isin(POINTS)].pivot(index="arm", columns="point", values=value)
    for arm, gaps in wide.sort_values("1.8x" if "1.8x" in wide else wide.columns[0]).iterrows():
        lines.append(f"| {arm} | " + " | ".join(number(gaps.get(point)) for point in POINTS) + " |")
    return lines


def furthest_off(rows: pd.DataFrame) -> float:
    """The largest difference of the keep ratio that the plain form was asked for and the one it got."""
    runs = rows[rows.arm == PLAIN]
    return float((runs.keep_ratio - runs.asked_keep_ratio).abs().max())


def asked_table(rows: pd.DataFrame) -> list[str]:
    """What the plain form was asked for, and what came out: means of `rows`, all of one budget."""
    table = summary(rows)
    gap = table.set_index(["arm", "point"]).gap
    mine = table[table.arm == PLAIN].set_index("point")
    other = gap[f"{PLAIN}-at2.2", "trained"]
    lines = [
        ("gap at 1.8x, of top-k's", "≤ 1/3", f"{mine.gap['1.8x'] / gap['topk-alt', '1.8x']:.4f}"),
        ("gap at 1.8x, of the paper's", "≤ 1/2", f"{mine.gap['1.8x'] / gap['paper-0.03', '1.8x']:.4f}"),
        ("gap at 1.8x", "≤ 0.06", f"{mine.gap['1.8x']:.4f}"),
        ("recall gap at 1.8x, 2,048 tokens", "≤ 0.1", f"{mine.recall_gap['1.8x']:.4f}"),
        ("gap at 1.5x", "≤ 0.03", f"{mine.gap['1.5x']:.4f}"),
        ("moved to 2.2x, above a model trained for 2.2x", "≤ 0.03", f"{mine.gap['2.2x'] - other:.4f}"),
        ("keep ratio asked and got, furthest apart", "≤ 0.02", f"{furthest_off(rows):.4f}"),
    ]
    return ["| | asked for | found |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in lines)]


def budget_table(table: pd.DataFrame) -> list[str]:
    """The gap at 1.8x of the arms that were trained at more than one budget."""
    part = table[table.point == "1.8x"].pivot(index="arm", columns="tokens", values="gap").dropna()
    lines = ["| arm | " + " | ".join(f"{tokens / 1e6:.3g}M" for tokens in part) + " |"]
    lines.append("|---" * (part.shape[1] + 1) + "|")
    for arm, gaps in part.iterrows():
        lines.append(f"| {arm} | " + " | ".join(map(number, gaps)) + " |")
    return lines


def block(root: Path) -> str:
    """The page of the committed result."""
    return page(newest_result(root))


def page(result: dict[str, Any]) -> str:
    """The text of docs/quality.md below its heading."""
    rows = pd.DataFrame(result["rows"])
    table = summary(rows)
    lines = [
        "Written by `python -m scripts.pages` from the committed result file; every run's own record lies in",
        "`benchmarks/results/quality/`, in a folder for each base.",
        "",
        f"{result['device_name']}, {result['dtype']}, torch {result['versions']['torch']}, "
        f"{result['date'][:10]}. Made by `{result['command']}`.",
        "",
        "Every arm starts from a dense base and sees the same tokens in the same order (bases of different",
        "days are trained alike, and a run is compared with its own base's continuation). The gap is",
        "the loss on held-out text above that of the base trained on for as long (dense continuation), in",
        "nats a token, with hard routing by the packed code that users run. The recall gap is the same for",
        "the second copy of a passage, read 2,048 tokens after the first one (or as far as the context",
        "goes). FLOPs is the share of a dense model's operations that is executed. ± is the standard",
        "deviation over runs (seeds and bases).",
    ]
    if PLAIN in set(table.arm):
        lines += ["", f"## What the plain form (`{PLAIN}`: `MoDConfig()`) had to reach", ""]
        lines += asked_table(rows[rows.tokens == rows.tokens.min()])
    if len(budgets := budget_table(table)) > 2:
        lines += ["", "Gap at 1.8x after more tokens:", "", *budgets]
    if table.gap_to_base.notna().any():
        lines += [
            "",
            "Routers alone, the base frozen: loss above that of the very weights that are routed (the tables",
            "below compare with a base that was trained on).",
            "",
            *moved_table(table[table.gap_to_base.notna()], "gap_to_base"),
        ]
    for tokens in sorted(table.tokens.unique()):
        part = table[table.tokens == tokens]
        name = f"{tokens / 1e6:.3g}M"
        lines += ["", f"## {name} tokens of conversion", "", *trained_table(part)]
        if part.point.isin(POINTS).any():
            lines += [
                "",
                "Thresholds moved after training (`modlab.calibrate`): gap at the same KV saving.",
                "",
            ]
            lines += moved_table(part)
        for axis, title in AXES.items():
            lines += ["", f"![Loss gap over {title}]({picture_name(tokens, axis)})"]
    return "\n".join(lines)


def picture_name(tokens: float, axis: str) -> str:
    """The file of one budget's picture."""
    return f"quality_{tokens / 1e6:.3g}M_{axis}.png"


def draw(docs: Path, result: dict[str, Any] | None = None) -> list[Path]:
    """Draws the pictures of the page into `docs`; returns their paths."""
    table = summary(pd.DataFrame((result or newest_result(docs.parent))["rows"]))
    drawn = []
    for tokens in sorted(table.tokens.unique()):
        for axis in AXES:
            drawn.append(docs / picture_name(tokens, axis))
            save_png(figure(table[table.tokens == tokens], axis), drawn[-1], WIDTH, HEIGHT)
    return drawn
