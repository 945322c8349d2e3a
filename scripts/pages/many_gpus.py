"""Several GPUs against one, from what `python -m benchmarks.many_gpus` wrote."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from scripts.pages.screenshot import save_png

WIDTH, HEIGHT = 1000, 420
PLOTLY = "application/vnd.plotly.v1+json"
FOLDER = Path("benchmarks", "results", "many_gpus")
WAYS = {
    "one": "one GPU", "one large": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2",
    "ddp two": "DDP on two", "fsdp2 two": "FSDP2 on two", "llama-3-70b distilled": "FSDP2",
}  # fmt: skip
INFERENCE = {
    "alone": "one GPU",
    "tensor parallel": "tensor parallel",
    "device_map": "layers spread (`device_map`)",
}
TRAINED = {way: "FSDP2" if "FSDP2" in name else "DDP" for way, name in WAYS.items()}
"""Names of the planner's lines. One GPU holds what each copy of DDP does."""

PLANNED = {"alone": "copies", "tensor parallel": "tensor parallel", "device_map": "layers spread"}
LARGE = {f"llama-3-70b {part}": name for part, name in INFERENCE.items() if part != "alone"}
EFFICIENCY = {of: f"scaling efficiency, of {of}" for of in ("one GPU", "two GPUs")}
"""Of as many rows a GPU; told where there are more than two."""

IN_TYPE = "bfloat16"
"""That the planner plans in, as the models' configs say; the same model in fp32 has no plan."""

OWN_SCENE = re.compile("^(killed|resumed), killed")
"""Parts whose scene has a name that says no more."""

NOTHING = "No run with these tables yet."


def block(root: Path) -> str:
    """The tables of every run, newest first."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((root / FOLDER).glob("*.json"))]
    runs = [run for run in found if not run["toy"] and any(map(_is_told, run["parts"].values()))]
    runs.sort(key=_date, reverse=True)
    texts = [text for run in runs for text in _texts(run)]
    notebook = executed(root)
    if notebook is not None:
        texts.append(f"Notebook 6, executed there (`{notebook.relative_to(root)}`):")
        texts += [f"![A figure of notebook 6]({name})" for name in pictures(notebook)]
    return "\n\n".join(texts) or NOTHING


def executed(root: Path) -> Path | None:
    """The newest notebook with outputs, by its name."""
    found = sorted((root / FOLDER).glob("*.ipynb"))
    return found[-1] if found else None


def pictures(notebook: Path) -> dict[str, dict[str, Any]]:
    """Its plotly figures, by the name of their file in docs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    figures = [data[PLOTLY] for data in shown if PLOTLY in data]
    return {f"many_gpus_notebook_{number}.png": figure for number, figure in enumerate(figures, 1)}


def draw(docs: Path) -> list[Path]:
    """Draws the notebook's figures into `docs`, if one was executed; returns their paths."""
    notebook = executed(docs.parent)
    drawn = {} if notebook is None else pictures(notebook)
    for name, figure in drawn.items():
        save_png(go.Figure(figure), docs / name, WIDTH, HEIGHT)
    return [docs / name for name in drawn]


def _is_told(part: dict[str, Any]) -> bool:
    return "scenes" in part or "by length" in part


def _date(run: dict[str, Any]) -> str:
    return max(str(part.get("date", "")) for part in run["parts"].values())


def _texts(run: dict[str, Any]) -> Iterable[str]:
    parts = run["parts"]
    first = next(part for part in parts.values() if _is_told(part) and "device_name" in part)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(first["versions"].items()))
    commands = [run["command"]] if isinstance(run["command"], str) else run["command"]
    said = ", then ".join(f"`{command}`" for command in commands)
    note = f" {run['note']}" if "note" in run else ""
    yield f"{said} on {first['device_name']}, {versions}, {first['date'][:10]}.{note}"
    yield from filter(None, (_speed(run), _equal(run), _time(parts), _inference(parts), _large(parts)))
    ended = [
        f"{name} ({part['ended with']})" for name, part in parts.items() if part["ended with"] == "its limit"
    ]
    unfinished = [f"ended by a limit: {', '.join(ended)}"] if ended else []
    unfinished += [f"not begun: {', '.join(run['not begun'])}"] if run["not begun"] else []
    if unfinished:
        yield "; ".join(unfinished).capitalize() + "."


def _speed(run: dict[str, Any]) -> str:
    heads: tuple[str, ...] = (
        "trained: routers distilled, or as said", "rows of a global batch", "way", "tokens/s",
        "times one GPU, same batch", "times one GPU, as many rows a GPU", "allocated a GPU, GiB", "planned",
    )  # fmt: skip
    rows = []
    further = [of for of in EFFICIENCY if any(EFFICIENCY["two GPUs"] in s for s in run["compared"].values())]
    for way, name in WAYS.items():
        for title, scene in run["parts"].get(way, {}).get("scenes", {}).items():
            if "tokens_per_s" not in scene:
                continue
            said = run["compared"].get(f"{way}, {title}", {})
            times = [
                said.get(f"tokens a second, times one GPU, {what}")
                for what in ("the same global batch", "as many rows a GPU")
            ]
            most = max(scene["allocated"].values(), default=0) / 2**30
            rows.append(
                (title.rpartition(", ")[0], scene["rows"], name, f"{scene['tokens_per_s']:,.0f}",
                 *("" if one is None else f"{one:.2f}x" for one in times), f"{most:.1f}",
                 _planned(scene, TRAINED[way]),
                 *(f"{said[EFFICIENCY[of]]:.0%}" if EFFICIENCY[of] in said else "" for of in further))
            )  # fmt: skip
    heads += tuple(EFFICIENCY[of] for of in further)
    return _table(heads, sorted(rows, key=lambda row: (row[0], -row[1])))


def _planned(figures: dict[str, Any], way: str) -> str:
    """GiB by the planner."""
    known = {line["way"]: line["total"] for line in figures.get("planned", [])}
    value = known.get(way)
    return "" if value is None else f"{value:.1f}"


def _equal(run: dict[str, Any]) -> str:
    heads = (
        "against one GPU, or as said", "log lines", "largest difference of loss", "of KL",
        "of the keep ratio",
    )  # fmt: skip
    rows = [
        (OWN_SCENE.sub(r"\1", name), said["log lines compared"], *(
            f"{said[f'largest difference of {what}']:.4f}" if f"largest difference of {what}" in said else ""
            for what in ("loss", "kl", "keep_ratio")
        ))
        for name, said in run["compared"].items() if "log lines compared" in said
    ]  # fmt: skip
    return _table(heads, rows)


def _time(parts: dict[str, Any]) -> str:
    told = parts.get("ddp", {}).get("scenes", {}).get("where the time goes")
    if told is None:
        return ""
    heads = (f"DDP, a step of {told['rows']} rows", *told["processes"][0])
    return _table(
        heads,
        [
            (f"process {number}", *(f"{value:,.1f}" for value in own.values()))
            for number, own in enumerate(told["processes"])
        ],
    )


def _inference(parts: dict[str, Any]) -> str:
    heads = (
        "inference", "gates, type", "weights a GPU, GiB", "K/V a GPU", "allocated", "planned",
        "largest difference of logits", "decided alike", "same tokens",
    )  # fmt: skip
    rows = []
    for part, name in INFERENCE.items():
        for kind, found in parts.get(part, {}).items():
            if not isinstance(found, dict) or "weight_bytes" not in found:
                continue
            off = found.get("largest difference of logits")
            same = f"{found['same tokens']} of {found['of tokens']}" if "same tokens" in found else ""
            rows.append(
                (name, kind, *(_most(found[what]) for what in ("weight_bytes", "kv_bytes", "allocated")),
                 _planned(parts[part], PLANNED[part]) if kind.endswith(IN_TYPE) else "",
                 "" if off is None else f"{off:.2g}",
                 f"{found['decided alike']:.2%}" if "decided alike" in found else "", same)
            )  # fmt: skip
    return _table(heads, rows)


def _large(parts: dict[str, Any]) -> str:
    heads = (
        "70B shape, random weights, tokens", "way", "K/V", "prefill, s", "a token, ms",
        "weights a GPU, GiB", "K/V a GPU", "allocated", "planned (dense)",
    )  # fmt: skip
    rows = []
    for part, way in LARGE.items():
        told = parts.get(part, {})
        for length, kinds in told.get("by length", {}).items():
            for kind, row in kinds.items():
                rows.append((f"{int(length):,}", way, kind, *_large_row(part, told, length, row)))
    return _table(heads, rows)


def _large_row(part: str, told: dict[str, Any], length: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return ("refused", *[""] * 5)
    planned = {"planned": told.get("planned", {}).get(length, [])}
    seconds = f"{row['prefill, s']:.2f}" + ("" if row["finite"] else " (not finite)")
    held = (told["weight_bytes"], row["kv_bytes"], row["allocated"])
    plan = _planned(planned, PLANNED[part.removeprefix("llama-3-70b ")])
    return (seconds, f"{row['decode, ms']:.1f}", *map(_most, held), plan)


def _most(by_place: dict[str, int]) -> str:
    return f"{max(by_place.values(), default=0) / 2**30:.2f}"


def _table(heads: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])
