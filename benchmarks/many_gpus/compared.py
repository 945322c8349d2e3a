"""What several GPUs said next to what one said."""

from __future__ import annotations

import re
from typing import Any

TRAINED = re.compile(r"(?P<model>\S+) (?P<way>ddp|fsdp2)(?P<kind>.*)")
SKIPPED = re.compile(r"(?P<model>\S+) skipping (?P<way>ddp|fsdp2)")
RESUMED = re.compile(r"(?P<model>\S+) resumed(?P<kind>.*)")


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By part: tokens a second as a multiple of one GPU's, the largest differences of a step's figures."""
    said: dict[str, Any] = {}
    for part, figures in found.items():
        for pattern, other in ((TRAINED, "{model} one{kind}"), (SKIPPED, "{model} skipping one"),
                               (RESUMED, "{model} one{kind}")):  # fmt: skip
            if match := pattern.fullmatch(part):
                one = found.get(other.format(**match.groupdict()), {})
                said[part] = _against(figures, one)
            if match and pattern is TRAINED and "tokens_per_s" in figures and "tokens_per_s" in one:
                times = figures["tokens_per_s"] / one["tokens_per_s"]
                said[part]["tokens a second, times one GPU"] = times
    return said


def _against(figures: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    before = {row["step"]: row for row in one.get("steps", [])}
    pairs = [(before[row["step"]], row) for row in figures.get("steps", []) if row["step"] in before]
    if not pairs:
        return {}
    said: dict[str, Any] = {"steps compared": len(pairs)}
    for name in ("loss", "kl", "keep_ratio"):
        off = [abs(a[name] - b[name]) for a, b in pairs if name in a and name in b]
        if off:
            said[f"largest difference of {name}"] = max(off)
    return said
