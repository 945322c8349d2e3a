"""Write benchmarks/versions/model_types.json: which model types of the installed transformers convert.

    python -m scripts.model_types                # every causal LM type; then: python -m scripts.pages
    python -m scripts.model_types --print llama  # only show what is found, for some types

Takes a few minutes for all types on two CPU cores.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "versions" / "model_types.json"


def record(types: list[str] | None) -> dict[str, Any]:
    """What the report says of these types (None: all), as the file holds it."""
    import transformers

    from modlab.families import support

    report = support.report(types).sort_values("model_type")
    return {
        "command": "python -m scripts.model_types",
        "transformers": transformers.__version__,
        "promised": sorted(support.REQUIRED),
        "rows": [with_skips(row) for row in report.to_dict("records")],
    }


def with_skips(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a type, and which skips a tiny model of it converts with."""
    from modlab import skips

    works = row["supported"]
    return {**row, "skips": [name for name in skips.names() if works and _converts(row["model_type"], name)]}


def _converts(model_type: str, skip: str) -> bool:
    from modlab import ModlabError, convert
    from modlab.families.tiny_models import tiny_model

    try:
        convert(tiny_model(model_type), _every_layer(skip))
    except ModlabError:
        return False
    return True


def _every_layer(skip: str) -> Any:
    """A config that routes all layers, unless the skip chooses them; tiny models have small windows."""
    from modlab import MoDConfig, ModlabError

    try:
        return MoDConfig(skip=skip, layers="all", keep_recent=2)
    except ModlabError:
        return MoDConfig(skip=skip, keep_recent=2)


def main(arguments: list[str]) -> int:
    """Measures, and writes or prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="with --print: these types only")
    parser.add_argument("--print", action="store_true", dest="show", help="write nothing")
    options = parser.parse_args(arguments)
    if options.types and not options.show:
        parser.error("the file holds all types; give types only with --print")
    text = json.dumps(record(options.types or None), indent=1) + "\n"
    if options.show:
        print(text, end="")
    else:
        TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
