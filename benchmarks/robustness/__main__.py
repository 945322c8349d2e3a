"""`python -m benchmarks.robustness`: runs all of it and writes one JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.robustness.decoding import CASES, decode
from benchmarks.robustness.fuzz import folder_parsers, fuzz, parsers
from benchmarks.robustness.kills import KINDS, kill_savers
from modlab.bench.results import circumstances, source_commit


def main() -> int:
    """Status 1 if anything was lost, mixed, wrong or crashed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    options.add_argument("--kills", type=int, default=200, help="of each kind of folder")
    options.add_argument("--inputs", type=int, default=5000, help="damaged files for each parser")
    options.add_argument("--tokens", type=int, default=100_000, help="decoded in each case of a long text")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/robustness"), help="folder")
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result: dict[str, Any] = {
        "what": "robustness",
        "command": f"python -m benchmarks.robustness --kills {given.kills} --inputs {given.inputs}",
        "commit": source_commit(),
        **circumstances(torch.device("cpu"), torch.float32),
        "kills": [_killed(kind, given.kills) for kind in KINDS],
        "fuzz": _fuzzed(given.inputs),
        "decoding": [_decoded(case, given.tokens) for case in CASES],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"robustness_cpu_{result['date'][:10]}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file)
    bad = [
        row for row in result["kills"] if row["mixed"] or row["refused"] or row["lost"] or row["leftovers"]
    ]
    bad += [row for row in result["fuzz"] if row["wrong"] or row["crashed"]]
    bad += [row for row in result["decoding"] if row["grew"]]
    return 1 if bad else 0


def _killed(kind: str, kills: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        row = dataclasses.asdict(kill_savers(kind, kills, Path(folder)))
    print(row, file=sys.stderr)
    return row


def _decoded(case: str, tokens: int) -> dict[str, Any]:
    row = dataclasses.asdict(decode(case, tokens))
    print(row, file=sys.stderr)
    return row


def _fuzzed(inputs: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as model:
        for name, parser in {**parsers(Path(folder)), **folder_parsers(Path(model))}.items():
            rows.append(dataclasses.asdict(fuzz(name, parser, inputs)))
            print({**rows[-1], "traceback": ""}, file=sys.stderr)
    return rows


if __name__ == "__main__":
    sys.exit(main())
