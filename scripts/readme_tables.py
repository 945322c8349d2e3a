"""Rewrite the README's tables of measured figures from the committed result files: no figure is typed.

    python scripts/readme_tables.py            # rewrite README.md
    python scripts/readme_tables.py --check    # only say whether it is up to date (exit status 1 if not)

Reads modlab/demo/results.json (what the demo's scripts measured) and benchmarks/results/*.json (`modlab
bench`); of several results for the same thing on the same device the newest counts.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DEMO_CARD = "modlab/demo/README.md"
DEMO_NAMES = {
    "dense": "dense",
    "dense_continuation": "dense, trained on for as long",
    "mod": "Mixture-of-Depths",
}


def demo_table(record: dict[str, Any]) -> str:
    """What the demo's conversion costs in loss and saves in memory."""
    lines = [
        f"The demo models ({record['parameters'] / 1e6:.1f} M parameters), on held-out Python files "
        f"({record['results']['mod']['tokens']:,} predicted tokens, {record['dtype']}):",
        "",
        "| model | held-out loss (nats a token) | tokens kept in routed layers | KV cache |",
        "|---|---|---|---|",
    ]
    for name, title in DEMO_NAMES.items():
        result = record["results"][name]
        kept = f"{result['keep_ratio']:.0%}" if "keep_ratio" in result else "all"
        saving = f"{result['kv_saving']:.2f}x smaller" if "kv_saving" in result else "1x"
        lines.append(f"| {title} | {result['loss']:.3f} | {kept} | {saving} |")
    lines += [
        "",
        f"Made by `{record['command']}` on {record['date'][:10]}; all of it is in [the card]({DEMO_CARD}).",
    ]
    return "\n".join(lines)


def newest(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest result of each benchmark and device, by name."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: result["date"]):
        latest[result["what"], result["device_name"]] = result
    return [latest[key] for key in sorted(latest)]


def bench_table(results: list[dict[str, Any]]) -> str:
    """Time and memory against the dense model, one row a measurement, each group with its command."""
    parts = []
    for result in results:
        lines = [
            f"`{result['command']}` on {result['device_name']}, {result['dtype']}, torch "
            f"{result['versions']['torch']}, {result['date'][:10]}:",
            "",
            "| | model | tokens | routed layers | kept there | dense | MoD | speed-up | ideal | KV saving |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            lines.append(
                f"| {row['case']} | {row['shape']} | {row['context']:,} "
                f"| {row['routed_layers']} of {row['num_layers']} "
                f"| {row['keep_ratio']:.0%} | {row['dense_ms']:,.1f} ms | {row['mod_ms']:,.1f} ms "
                f"| {row['speedup']:.2f}x | {row['ideal']:.2f}x | {row['kv_saving']:.2f}x |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def section(root: Path = ROOT) -> str:
    """All tables, from the result files below `root`."""
    parts = []
    demo = root / "modlab" / "demo" / "results.json"
    if demo.is_file():
        parts.append(demo_table(json.loads(demo.read_text(encoding="utf-8"))))
    files = sorted((root / "benchmarks" / "results").glob("*.json"))
    results = newest(json.loads(path.read_text(encoding="utf-8")) for path in files)
    if results:
        parts.append(bench_table(results))
    return "\n\n".join(parts) or "No result files are in the repository yet."


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """`text` with what stands between the two markers replaced; both must be there, once."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"README.md must hold {begin} and {end}, once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = replace_between(old, BEGIN, END, section())
    if options.check:
        print(
            "README.md is up to date" if new == old else "README.md is out of date: run this without --check"
        )
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
