"""docs/quality.md: what each way to store keys and values costs at the same saving (`real_models join`)."""

from pathlib import Path
from typing import Any

from scripts.pages import measured

STORED = {
    measured.AUTO: "16 bits",
    measured.INT8: "eight bits",
    measured.K6V4: "keys in six, values in four",
}
SAVINGS = (1.0, *measured.MEASURED_AT[measured.K6V4])
"""All keys kept, and what was measured of each."""


def block(root: Path) -> str:
    """A line a saving and way to store; KL, worst recall gap and worst retrieval of each model."""
    found = {stored: _ships(root, stored) for stored in STORED}
    models = sorted(found[measured.K6V4])
    head = "".join(f" {model}: got; KL, worst recall gap, worst retrieval |" for model in models)
    lines = [f"| | stored in |{head}", "|---" * (len(models) + 2) + "|"]
    for saving in SAVINGS:
        for stored, said in STORED.items():
            cells = [_cell(found[stored].get(model), saving) for model in models]
            asked = "all keys kept" if saving == 1 else f"{saving:g}x"
            lines.append(f"| {asked} | {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ships(root: Path, stored: str) -> dict[str, dict[str, Any]]:
    """By model the newest record of routers that ship."""
    return {one["model"]: one for one in measured.records(root, stored) if measured.ships(one)}


def _cell(record: dict[str, Any] | None, saving: float) -> str:
    row = {} if record is None else measured.own_rows(record).get(saving, {})
    if "kl_far" not in row:
        return "-"
    kl, recall, retrieval = (aim.read(row, []) for aim in measured.AIMS[:3])
    got = f"{row['ratio']:.2f}x; " if "ratio" in row else ""
    return f"{got}{kl}, {recall}, {retrieval}"
