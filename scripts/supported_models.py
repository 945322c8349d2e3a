"""Rewrite the README's section on supported models from `modlab.families.report()`.

    python scripts/supported_models.py                 # every causal LM type of the installed transformers
    python scripts/supported_models.py --print llama   # only show what would be written, for some types

Takes a few minutes for all types on two CPU cores.
"""

import argparse
import sys

import pandas
from readme_tables import README, replace_between

BEGIN, END = "<!-- supported:begin -->", "<!-- supported:end -->"


def section(report: pandas.DataFrame, transformers_version: str) -> str:
    """The section in Markdown: promised types as a table, other working ones, the rest with reasons."""
    from modlab.families.support import REQUIRED

    works = report[report.supported]
    fails = report[~report.supported]
    promised = works[works.model_type.isin(REQUIRED)].sort_values("model_type")
    others = works[~works.model_type.isin(REQUIRED)].sort_values("model_type")
    lines = [
        f"Checked with transformers {transformers_version}: {len(works)} of {len(report)} causal LM types "
        "convert (`modlab.families.report()` repeats the check on your versions).",
        "",
        "| model type | class |",
        "|---|---|",
        *(f"| `{row.model_type}` | {row.class_name} |" for row in promised.itertuples()),
    ]
    if len(others):
        lines += ["", "Also: " + ", ".join(f"`{name}`" for name in others.model_type) + "."]
    if len(fails):
        lines += ["", f"<details><summary>{len(fails)} types that do not convert, and why</summary>", ""]
        lines += ["| model type | reason |", "|---|---|"]
        reasons = (
            (row.model_type, str(row.reason).replace("|", "\\|").replace("<", "&lt;"))
            for row in fails.itertuples()
        )
        lines += [f"| `{name}` | {reason} |" for name, reason in sorted(reasons)]
        lines += ["", "</details>"]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    import transformers

    from modlab.families import support as families

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="with --print: these types only")
    parser.add_argument("--print", action="store_true", dest="show", help="do not write README.md")
    options = parser.parse_args(arguments)
    if options.types and not options.show:
        parser.error("the README lists all types; give types only with --print")
    content = section(families.report(options.types or None), transformers.__version__)
    if options.show:
        print(content)
    else:
        text = README.read_text(encoding="utf-8")
        README.write_text(replace_between(text, BEGIN, END, content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
