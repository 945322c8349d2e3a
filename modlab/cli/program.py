"""The command line: `modlab lab | convert | fit | train | ...`, or `python -m modlab`.

One file a command, each with `add` (its parser) and `run`. Heavy modules are imported by `run`, so that
`modlab --help` answers at once. A mistake the user can correct ends in a message of a few lines on stderr and
exit status 2; `--traceback` shows where it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from modlab import __version__
from modlab.cli import bench, convert, evaluate, export, fit, lab, plan, probe, report, sweep, train
from modlab.cli.flags import BAD_INPUT, INTERRUPTED, HelpFormatter
from modlab.errors import ModlabError
from modlab.warn import ModlabWarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: arguments without the program's name; those of this process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments, passed_on = split_passed_on(arguments)
    options = build_parser().parse_args(arguments, argparse.Namespace(passed_on=passed_on))
    try:
        with _one_rank_prints(), _warnings_in_words():
            status: int = options.run(options)
        return status
    except (ModlabError, OSError) as problem:
        if options.traceback:
            raise
        print(f"modlab: error: {problem}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("modlab: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _one_rank_prints() -> Iterator[None]:
    """Of the processes that `accelerate launch` started, the first one prints and warns for all; each
    has its own errors."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _warnings_in_words() -> Iterator[None]:
    """modlab's own warnings come as errors do, without a line of code: the user has written none."""
    before = warnings.formatwarning

    def told(
        message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not issubclass(category, ModlabWarning):
            return before(message, category, filename, lineno, line)
        return f"modlab: warning: {message}\n"

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = before


def split_passed_on(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What this parser reads, and what belongs to another: all that follows `bench`, and in `lab` what
    follows `--` (argparse would hand the first of it to the optional DIR)."""
    arguments = list(arguments)
    command = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    name = arguments[command : command + 1]
    if name == ["bench"]:
        passed_on = [word for word in arguments[command + 1 :] if word != "--traceback"]
        ours = ["--traceback"] if "--traceback" in arguments else []
        return [*ours, "bench"], passed_on
    if name == ["lab"] and "--" in arguments:
        end = arguments.index("--")
        return arguments[:end], arguments[end + 1 :]
    return arguments, []


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="modlab",
        description="Turn a causal language model into a Mixture-of-Depths model; train and measure it.",
        epilog="`modlab COMMAND --help` explains one. MODEL is 'demo', 'smollm2-kv', a folder or a hub id.",
    )
    parser.add_argument("--version", action="version", version=f"modlab {__version__}")
    # Accepted before and after the command: SUPPRESS keeps the second from undoing the first.
    common = argparse.ArgumentParser(add_help=False)
    for target, default in ((parser, False), (common, argparse.SUPPRESS)):
        target.add_argument(
            "--traceback", action="store_true", default=default, help="show the full traceback of errors"
        )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str = "") -> Any:
        sub = commands.add_parser(
            name,
            parents=[common],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {text}".strip(),
            formatter_class=HelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    for module in (lab, convert, fit, train, evaluate, probe, report, sweep, export, plan, bench):
        module.add(command)
    return parser
