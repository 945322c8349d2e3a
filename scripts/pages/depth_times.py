"""The table of times of the depth section of docs/quality.md: prompts and tokens of real models.

Through `generate`, from `python -m benchmarks.depth prefill`, whose rows stand in
benchmarks/results/depth_*.json.
"""

import json
from pathlib import Path
from typing import Any

NONE = "No model's own weights have been timed yet (`python -m benchmarks.depth prefill`)."
SKIPS = {"kv": "K/V routed", "prompt": "leaving", "kv+prompt": "both"}


def block(root: Path) -> str:
    """A line a model, context, skip and way of deciding, of the newest result."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    results = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((root / "benchmarks" / "results").glob("depth_*.json"))
    )
    for result in sorted(results, key=lambda one: str(one["date"])):
        for row in result.get("prefill", []):
            routing = row.get("routing", "drawn")
            found[row["model"], row["context"], routing, row["skip"]] = {**row, "of": result}
    if not found:
        return NONE
    lines = ["| | decided by | K/V | prompt, ms | by operations | a token, ms |", "|---|---|---|---|---|---|"]
    for (model, context, routing, skip), row in sorted(found.items()):
        lines.append(
            f"| {model}, {context:,} tokens, {SKIPS[skip]} | {_decided(routing, row)} | {_ratio(row)} | "
            f"{row['dense_ms']:.1f} to {row['mod_ms']:.1f} ({row['speedup']:.2f}x) | {row['ideal']:.2f}x | "
            f"{_token(row)} |"
        )
    where = "; ".join(dict.fromkeys(_where(row["of"]) for row in found.values()))
    return "\n".join([*lines, "", f"Dense time to that of the arm, medians, one row alone. {where}."])


def _where(result: dict[str, Any]) -> str:
    torch = result["versions"]["torch"]
    return f"{result['device_name']}, {result['dtype']}, torch {torch}, {result['date'][:10]}"


def _decided(routing: str, row: dict[str, Any]) -> str:
    if row["skip"] == "prompt":
        return "position"
    return f"`{row['routers']}` on {row['text']}" if routing == "trained" else "chance"


def _ratio(row: dict[str, Any]) -> str:
    if row["skip"] == "prompt":
        return "1x"
    return f"{row['ratio']:.2f}x" if "ratio" in row else f"{1 / row['keep_ratio']:.3g}x asked"


def _token(row: dict[str, Any]) -> str:
    if "mod_token_ms" not in row:
        return "-"
    return f"{row['dense_token_ms']:.2f} to {row['mod_token_ms']:.2f} ({row['token_speedup']:.2f}x)"
