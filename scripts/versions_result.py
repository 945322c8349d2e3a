"""Writes what `.ci/versions` found to benchmarks/versions/<name>.json: versions, counts, every failure."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "huggingface-hub", "tokenizers"),
    *("peft", "trl", "lm-eval", "torchao", "bitsandbytes", "optimum-quanto", "numpy", "pandas"),
)
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "versions"


def outcome(results: list[Path]) -> dict[str, Any]:
    """Counts and failures of JUnit files that pytest wrote."""
    roots = [ElementTree.parse(path).getroot() for path in results]
    suites = [suite for root in roots for suite in root.iter("testsuite")]
    names = ("tests", "failures", "errors", "skipped")
    total, failed, errors, skipped = (sum(int(s.get(name, 0)) for s in suites) for name in names)
    wrong = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites)),
        "failures": wrong,
    }


def versions() -> dict[str, str]:
    """Installed versions of what the tests lean on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was tested, "" outside a git checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def main(name: str, command: str, *results: str) -> None:
    """Writes the file and prints its path."""
    facts = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": command.strip(),
        "python": platform.python_version(),
        "versions": versions(),
        **outcome([Path(path) for path in results]),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{path.relative_to(FOLDER.parent.parent)}: {facts['passed']} passed, {facts['failed']} failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
