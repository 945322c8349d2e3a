"""Which model types convert, from what `python -m scripts.model_types` found."""

import json
from pathlib import Path
from typing import Any

FOUND = Path("benchmarks", "versions", "model_types.json")


def found(root: Path) -> dict[str, Any]:
    """The report: transformers' version, the promised types, and a row a type."""
    record: dict[str, Any] = json.loads((root / FOUND).read_text(encoding="utf-8"))
    return record


def supported(root: Path) -> str:
    """The promised types as a table, the other working ones as a list."""
    record = found(root)
    works = [row for row in record["rows"] if row["supported"]]
    promised = [row for row in works if row["model_type"] in record["promised"]]
    others = [row for row in works if row["model_type"] not in record["promised"]]
    return "\n".join(
        [
            f"Checked with transformers {record['transformers']}: {len(works)} of {len(record['rows'])} "
            "causal LM types convert (`modlab.families.report()` repeats the check on your versions).",
            "",
            "| model type | class |",
            "|---|---|",
            *(f"| `{row['model_type']}` | {row['class_name']} |" for row in promised),
            "",
            "Also: " + ", ".join(f"`{row['model_type']}`" for row in others) + ".",
        ]
    )


def by_skip(root: Path) -> str:
    """How many of the types that convert do so with each skip."""
    rows = [row for row in found(root)["rows"] if row["supported"]]
    names = sorted({name for row in rows for name in row["skips"]})
    lines = ["| `skip=` | types | not |", "|---|---|---|"]
    for name in names:
        without = [f"`{row['model_type']}`" for row in rows if name not in row["skips"]]
        said = ", ".join(without) if len(without) <= 6 else f"{len(without)} types"
        lines.append(f'| `"{name}"` | {len(rows) - len(without)} | {said} |')
    return "\n".join(lines)


def refused(root: Path) -> str:
    """The types that do not convert, with the reason that modlab gives."""
    lines = ["| model type | reason |", "|---|---|"]
    for row in found(root)["rows"]:
        if not row["supported"]:
            reason = row["reason"].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{row['model_type']}` | {reason} |")
    return "\n".join(lines)
