"""What was killed, damaged and decoded at length, from what `python -m benchmarks.robustness` wrote."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path("benchmarks", "results", "robustness")


def latest(root: Path) -> dict[str, Any]:
    """The newest result, by its date."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((root / FOLDER).glob("*.json"))]
    newest: dict[str, Any] = max(found, key=lambda result: str(result["date"]))
    return newest


def block(root: Path) -> str:
    """Three tables, each with how it was made."""
    result = latest(root)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    lines = [
        f"`{result['command']}` on {result['device_name']}, {versions}, {result['date']}, "
        f"commit {str(result['commit'])[:7]}:",
        "",
        "| folder, saved over an older one | savers killed | then the old one whole | the new one whole "
        "| a mixture | unreadable | files of the user lost | left over after the next save |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["kills"]:
        bad = " | ".join(str(len(row[name])) for name in ("mixed", "refused", "lost", "leftovers"))
        lines.append(f"| {row['kind']} | {row['kills']} | {row['first']} | {row['second']} | {bad} |")
    lines += [
        "",
        "| damaged file | inputs | refused | read | read with a wrong value | other exceptions | slowest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["fuzz"]:
        bad = f"{len(row['wrong'])} | {len(row['crashed'])}"
        lines.append(
            f"| {row['parser']} | {row['inputs']:,} | {row['refused']:,} | {row['read']:,} | {bad} "
            f"| {row['slowest_ms']:,.0f} ms |"
        )
    lines += ["", *_decoded(result.get("decoding", []))]
    return "\n".join(lines)


def _decoded(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["A long decoding was not part of this run."]
    lines = [
        "| long decoding | tokens | most tokens that a layer stored | bound | what grew |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        most = max(sample[2] for sample in row["samples"])
        lines.append(
            f"| {row['case']} | {row['tokens']:,} | {most} | {row['bound']} | {row['grew'] or 'nothing'} |"
        )
    return lines
