"""docs/quality.md on real models: what gates cost at each KV saving, from benchmarks/results/real_*.json."""

import json
from pathlib import Path
from typing import Any

from modlab.published import GATES, REPORT, SHIPPED
from modlab.recipes import RECIPES
from scripts.pages import measured

CONTROLS = "coder-0.5b"
LIMITS = {"default": (0.02, 0.02), "memory": (0.05, None)}
"""Largest recall gap and KL that a recipe may have on every model."""
STORED = {measured.AUTO: "in 16 bits", measured.INT8: "in eight bits"}
"""How keys and values were stored that recipes choose from, in words; of `measured.K6V4` there is none."""
Settings = dict[str, dict[float, list[dict[str, Any]]]]
"""By model and saving a row a number of recent tokens, the saving's own first, each with "ships"."""


def block(root: Path) -> str:
    """Two tables: gates at each saving, and controls."""
    records = {record["model"]: record for record in _records(root)}
    lines = [
        "| model | asked | K/V by text | KL | agreement | recall gap | retrieval, of dense's |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, run in SHIPPED.items():
        rows = [row for row in _of(records[model], run) if ":" not in row["arm"]]
        lines += [_line(model, row) for row in sorted(rows, key=lambda row: row["ratio_asked"])]
    controls = [
        "| coder-0.5b | asked | got | KL | recall gap | retrieval, of dense's |",
        "|---|---|---|---|---|---|",
    ]
    rows = _of(records[CONTROLS], SHIPPED[CONTROLS])
    for row in sorted(rows, key=lambda row: (row["ratio_asked"], row["kl_far"])):
        if any(other["ratio_asked"] == row["ratio_asked"] and ":" in other["arm"] for other in rows):
            what = row["arm"].partition(": ")[2] or "**gates**"
            controls.append(
                f"| {what} | {row['ratio_asked']:g}x | {row['ratio']:.2f}x | {row['kl_far']:.4f} | "
                f"{_gaps(row)} | {_shares(row)} |"
            )
    return "\n".join(
        [
            _origin(records),
            "",
            *lines,
            "",
            "Distances: 256, 1,024, 4,000, 7,000 tokens. Standard errors of the recall gaps: "
            + ", ".join(f"{_error(records[model], run)} ({model})" for model, run in SHIPPED.items())
            + ". smollm2 itself answers few questions far away, see the log.",
            "",
            "The same bytes without looking at tokens:",
            "",
            *controls,
        ]
    )


def trained(root: Path) -> str:
    """A table of routers that `modlab train` made, measured by `modlab report`."""
    files = sorted((root / "benchmarks" / "results").glob("real_*_20*.json"))
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return reports([record for record in read if record["what"] == REPORT])


def reports(records: list[dict[str, Any]]) -> str:
    """A table a record of `modlab report`."""
    lines: list[str] = []
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        first = record["rows"][0]
        lines += [
            f"{record['model']}, {record['device_name']}, {record['dtype']}, {versions}, "
            f"{record['date'][:10]}, commit {record['commit'][:7]}, `{record['command']}`. {record['note']}",
            "",
            "| asked | K/V together | K/V by text | KL, from position 1,024 | agreement | "
            f"recall gap at {_places(first)} | retrieval, of dense's |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_report_line(row) for row in record["rows"]]
        lines += ["", f"Standard errors of the recall gaps: up to {_largest(record)}."]
    return "\n".join(lines)


def _report_line(row: dict[str, Any]) -> str:
    stored = {text: 1 / ratio for text, ratio in row["ratio_by_text"].items()}
    _, _, asked, rest = _line("", {**row, "keep_by_text": stored}).split("|", 3)
    return f"|{asked}| {row['ratio']:.2f}x |{rest}"


def _places(row: dict[str, Any]) -> str:
    return ", ".join(f"{int(distance):,}" for distance in row["recall_gap"])


def _largest(record: dict[str, Any]) -> str:
    return f"{max(error for row in record['rows'] for error in row['recall_gap_stderr'].values()):.3f}"


def recipes(root: Path) -> str:
    """What a recipe is to have, and the saving that has it, from the product's own records."""
    found = by_storage(root)
    lines: list[str] = []
    for stored, rows in found.items():
        lines += [*_figures_table(rows, STORED[stored]), ""]
    lines += ["\\* by routers that do not ship: those that do were not measured there.", ""]
    for name, limits in LIMITS.items():
        recall, kl = limits
        asked = f"a recall gap of at most {recall:g}" + ("" if kl is None else f" and a KL of at most {kl:g}")
        has = "; ".join(_has(rows, stored, *limits) for stored, rows in found.items())
        chosen = RECIPES[name]
        lines.append(
            f"- `{name}` is to have {asked} on all of them: {has}. It aims at {chosen.kv_saving:g}x "
            f'{STORED[chosen.mod.kv_cache_dtype]}, with `kv_cache_dtype="auto"` at '
            f"{chosen.kv_savings['auto']:g}x."
        )
    lines.append(
        f"- `safe` aims at {RECIPES['safe'].kv_saving:g}x {STORED[measured.AUTO]}, and stays there whatever "
        "`default` becomes."
    )
    return "\n".join(lines)


def _figures_table(rows: Settings, stored: str) -> list[str]:
    heads = [f"{model}: recent tokens: KL, worst recall gap" for model in SHIPPED]
    lines = [f"| asked, {stored} | " + " | ".join(heads) + " |", "|---" * (1 + len(SHIPPED)) + "|"]
    for saving in common_savings(rows):
        cells = [
            "; ".join(map(_figures, sorted(rows[model][saving], key=lambda row: -int(row["recent"]))))
            for model in SHIPPED
        ]
        lines.append(f"| {saving:g}x | " + " | ".join(cells) + " |")
    return lines


def _has(rows: Settings, stored: str, recall: float, kl: float | None) -> str:
    found = highest(rows, recall, kl)
    if found is None:
        return f"{STORED[stored]} none has it"
    return (
        f"{STORED[stored]} {found:g}x is the highest that has it, with "
        f"{_recents(rows, found, recall, kl)} recent tokens"
    )


def by_storage(root: Path) -> dict[str, Settings]:
    """`settings` of the committed records, by how keys and values were stored."""
    return {stored: settings(measured.records(root, stored)) for stored in STORED}


def worst_of_models(found: Settings, saving: float) -> tuple[float, float]:
    """The largest KL and recall gap of the models at a saving, with its own recent tokens."""
    rows = [found[model][saving][0] for model in SHIPPED]
    return max(row["kl_far"] for row in rows), max(map(_worst, rows))


def settings(records: list[dict[str, Any]]) -> Settings:
    """Of each model and saving the rows of the newest record of routers that ship; of others where there is
    none."""
    found: Settings = {}
    for record in sorted(records, key=lambda one: (measured.ships(one), str(one["date"]))):
        of_record: dict[float, list[dict[str, Any]]] = {}
        for row in record["rows"]:
            if row["ratio_asked"] > 1 and "kl_far" in row and measured.of_gates(row, record):
                one = {**row, "ships": measured.ships(record)}
                of_record.setdefault(row["ratio_asked"], []).append(one)
        found.setdefault(record["model"], {}).update(of_record)
    return found


def common_savings(found: Settings) -> list[float]:
    """Savings that were measured on every model."""
    return sorted(set.intersection(*(set(found.get(model, {})) for model in SHIPPED)))


def chosen(rows: list[dict[str, Any]], recall: float, kl: float | None) -> dict[str, Any] | None:
    """Of one model and saving the number of recent tokens with the lowest KL among those within the limits;
    None if none is."""
    within = [row for row in rows if _worst(row) <= recall and (kl is None or row["kl_far"] <= kl)]
    return min(within, key=lambda row: float(row["kl_far"]), default=None)


def of_recipe(found: dict[str, Settings], name: str, model: str, stored: str | None = None) -> dict[str, Any]:
    """A model's row at the saving of a recipe, with the recent tokens that the recipe's limits choose; as the
    recipe stores keys and values, unless it is said how."""
    kind: Any = RECIPES[name].mod.kv_cache_dtype if stored is None else stored
    rows = found[kind][model][RECIPES[name].kv_savings[kind]]
    best = chosen(rows, *LIMITS[name]) if name in LIMITS else None
    return rows[0] if best is None else best


def highest(found: Settings, recall: float, kl: float | None) -> float | None:
    """The largest saving at which every model has a number of recent tokens within the limits; None if there
    is none."""
    held = [
        saving
        for saving in common_savings(found)
        if all(chosen(found[model][saving], recall, kl) is not None for model in SHIPPED)
    ]
    return max(held, default=None)


def _recents(found: Settings, saving: float, recall: float, kl: float | None) -> str:
    rows = [chosen(found[model][saving], recall, kl) for model in SHIPPED]
    return ", ".join(f"{row['recent']:,}" for row in rows if row is not None)


def _worst(row: dict[str, Any]) -> float:
    return float(max(row["recall_gap"].values()))


def _figures(row: dict[str, Any]) -> str:
    return f"{row['recent']:,}: {row['kl_far']:.4f}, {_worst(row):.4f}{'' if row['ships'] else '*'}"


def _records(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "benchmarks" / "results").glob("real_*_20*.json"))
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [record for record in read if record["what"] == GATES and record["model"] in SHIPPED]


def _of(record: dict[str, Any], run: str) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["run"] == run and row["ratio_asked"] > 1]


def _line(model: str, row: dict[str, Any]) -> str:
    stored = [1 / share for share in row["keep_by_text"].values()]
    same = sum(row["top1_far_by_text"].values()) / len(row["top1_far_by_text"])
    ratios = f"{row['ratio_asked']:g}x | {min(stored):.1f}x to {max(stored):.1f}x"
    return f"| {model} | {ratios} | {row['kl_far']:.4f} | {same:.1%} | {_gaps(row)} | {_shares(row)} |"


def _gaps(row: dict[str, Any]) -> str:
    return " ".join(f"{gap:.3f}" for gap in row["recall_gap"].values())


def _shares(row: dict[str, Any]) -> str:
    return " ".join(f"{share:.2f}" for share in row["retrieval_of_dense"].values())


def _error(record: dict[str, Any], run: str) -> str:
    rows = [row for row in _of(record, run) if row["ratio_asked"] == 4]
    errors = [error for row in rows if ":" not in row["arm"] for error in row["recall_gap_stderr"].values()]
    return f"up to {max(errors):.3f} at 4x"


def _origin(records: dict[str, Any]) -> str:
    """Where each model's figures come from: base, command, and what its record says of them."""
    record = records[CONTROLS]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{record['device_name']}, {record['dtype']}, {versions}, {record['date'][:10]}; by the study's "
        "masks, not the product's cache, with gates in 16 bit, which no longer ship:",
        "",
    ]
    for model in SHIPPED:
        record = records[model]
        run = next(gates for gates in record["gates"] if gates["run"] == SHIPPED[model])
        rate, tokens = run["plan"]["rate"], run["distillation"]["tokens"]
        lines.append(
            f"- {model}: {record['base']}; {tokens:,} tokens at a learning rate of {rate:g}; commit "
            f"{record['commit'][:7]}, `{record['command']}`. {record['note']}"
        )
    return "\n".join(lines)
