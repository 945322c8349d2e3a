"""`python -m benchmarks.robustness`: runs all of it and writes one JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.robustness.decoding import CASES, decode
from benchmarks.robustness.fuzz import Parser, folder_parsers, fuzz, parsers
from benchmarks.robustness.kills import KINDS, kill_savers
from modlab.bench.results import circumstances, source_commit

PARTS = ("kills", "files", "folders", "decoding")


def main() -> int:
    """Status 1 if anything was lost, mixed, wrong or crashed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run; default all")
    options.add_argument("--kills", type=int, default=200, help="of each kind of folder")
    options.add_argument("--inputs", type=int, default=5000, help="damaged files for each parser")
    options.add_argument("--tokens", type=int, default=100_000, help="decoded in each case of a long text")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/robustness"), help="folder")
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, list[dict[str, Any]]] = {}
    for part in given.parts:
        found[part] = _run(part, given)
    _write(given, found)
    return 1 if any(_bad(row) for rows in found.values() for row in rows) else 0


def _run(part: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    if part == "kills":
        return [_killed(kind, given.kills) for kind in KINDS]
    if part == "decoding":
        return [_decoded(case, given.tokens) for case in CASES]
    return _fuzzed(parsers if part == "files" else folder_parsers, given.inputs)


def _write(given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """One file for all parts, or one for those that were asked for."""
    whole = set(found) == set(PARTS)
    asked = "" if whole else f" --parts {' '.join(found)}"
    sizes = {"kills": given.kills, "inputs": given.inputs, "tokens": given.tokens}
    result: dict[str, Any] = {
        "what": "robustness",
        "command": f"python -m benchmarks.robustness{asked}"
        + "".join(f" --{name} {value}" for name, value in sizes.items()),
        "commit": source_commit(),
        **circumstances(torch.device("cpu"), torch.float32),
        **found,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    name = "" if whole else f"_{'_'.join(found)}"
    file = given.out / f"robustness_cpu{name}_{result['date'][:10]}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file)


def _bad(row: dict[str, Any]) -> bool:
    names = ("mixed", "refused", "lost", "leftovers") if "kind" in row else ("wrong", "crashed", "grew")
    return any(row.get(name) for name in names)


def _killed(kind: str, kills: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        row = dataclasses.asdict(kill_savers(kind, kills, Path(folder)))
    print(row, file=sys.stderr)
    return row


def _decoded(case: str, tokens: int) -> dict[str, Any]:
    row = dataclasses.asdict(decode(case, tokens))
    print(row, file=sys.stderr)
    return row


def _fuzzed(made: Callable[[Path], dict[str, Parser]], inputs: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, parser in made(Path(folder)).items():
            rows.append(dataclasses.asdict(fuzz(name, parser, inputs)))
            print({**rows[-1], "traceback": ""}, file=sys.stderr)
    return rows


if __name__ == "__main__":
    sys.exit(main())
