"""The command line, one file a command; `program.py` puts them together."""

from modlab.cli.flags import BAD_INPUT, INTERRUPTED
from modlab.cli.program import build_parser, main, split_passed_on

__all__ = ["BAD_INPUT", "INTERRUPTED", "build_parser", "main", "split_passed_on"]
