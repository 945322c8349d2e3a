"""The commands and their flags, from the parsers themselves."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path


def parsers() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, summary and parser of each command, as `modlab --help` lists them."""
    from modlab.bench.command import _parser as bench_parser
    from modlab.cli import build_parser

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for choice in commands._choices_actions:
        parser = bench_parser() if choice.dest == "bench" else commands.choices[choice.dest]
        yield choice.dest, str(choice.help), parser


def overview(root: Path) -> str:
    """One line a command."""
    lines = ["| command | what it does |", "|---|---|"]
    for name, summary, parser in parsers():
        places = " ".join(_form(a) for a in parser._actions if not a.option_strings)
        lines.append(f"| `{f'modlab {name} {places}'.strip()}` | {_cell(summary)} |")
    return "\n".join(lines)


def reference(root: Path) -> str:
    """A section a command: what it does, and a table of its arguments."""
    parts = []
    for name, _, parser in parsers():
        lines = [
            f"## `modlab {name}`",
            "",
            _prose(parser.description or ""),
            "",
            "| argument | |",
            "|---|---|",
        ]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction) or action.dest == "traceback":
                continue
            text = parser._get_formatter()._expand_help(action) if action.help else ""
            lines.append(f"| `{_cell(_form(action))}` | {_cell(text)} |")
        if name == "bench":
            lines += ["", "| case | |", "|---|---|", *_cases()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cases() -> list[str]:
    from modlab.bench.command import register_cases
    from modlab.bench.registry import CASES

    register_cases()
    cases = sorted(CASES.items())  # not in the order in which somebody imported them
    return [f"| `{name}` | {_cell((run.__doc__ or '').splitlines()[0])} |" for name, run in cases]


def _form(action: argparse.Action) -> str:
    """An argument as one writes it: `--flag VALUE`, `[NAME ...]`."""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    value = str(value or action.dest.upper())
    if action.nargs in ("*", "+"):
        value = f"{value} ..."
    if action.nargs == 0:
        value = ""
    if action.option_strings:
        return f"{', '.join(action.option_strings)} {value}".strip()
    return f"[{value}]" if action.nargs in ("*", "?") else value


def _prose(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    """One line of a table; a line break of the help stays one."""
    return "<br>".join(re.sub(r"(?<!\\)\|", r"\\|", _prose(line)) for line in text.splitlines())
