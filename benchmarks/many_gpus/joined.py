"""Parts of several calls as one record, where one call did not bring them all:

    python -m benchmarks.many_gpus.joined NOTE --out FILE CALL.json:ddp,fsdp2 "OTHER.json:one,one large"

Each part says which command it is of; what is compared is worked out again from all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.many_gpus.compared import compared
from modlab.errors import ModlabError


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_gpus.joined")
    parser.add_argument("note", help="which calls these are, and what ran at the same time")
    parser.add_argument("calls", nargs="+", metavar="FILE:PART,...", help="the record of a call, its parts")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    taken = []
    for call in options.calls:
        file, _, names = call.rpartition(":")
        taken.append((json.loads(Path(file).read_text(encoding="utf-8")), names.split(",")))
    text = json.dumps(joined(options.note, taken), indent=1) + "\n"
    options.out.write_text(text, encoding="utf-8")


def joined(note: str, taken: list[tuple[dict[str, Any], list[str]]]) -> dict[str, Any]:
    """One record.

    Args:
        note: what a reader has to know of the calls.
        taken: records of calls with the names of the parts that are taken from them.

    Raises:
        ModlabError: a part is not there, is taken twice, or a record is a trial.
    """
    parts: dict[str, dict[str, Any]] = {}
    for record, names in taken:
        for name in names:
            if record["toy"] or name not in record["parts"] or name in parts:
                raise ModlabError(
                    f"{name!r} of {record['command']!r} is not there, of a trial, or of two calls: "
                    "take each part from one real call."
                )
            parts[name] = {"command": record["command"], **record["parts"][name]}
    return {
        "what": "many_gpus",
        "toy": False,
        "command": list(dict.fromkeys(record["command"] for record, _ in taken)),
        "note": note,
        "random weights": sorted({model for record, _ in taken for model in record["random weights"]}),
        "not begun": [],
        "parts": parts,
        "compared": compared(parts),
    }


if __name__ == "__main__":
    main()
