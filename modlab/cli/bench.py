"""`modlab bench`: dense against Mixture-of-Depths on this machine."""

from __future__ import annotations

import argparse

from modlab.cli.flags import Command


def add(command: Command) -> None:
    """The parser of this command."""
    command("bench", run, "run benchmarks of this modlab on this machine, dense against Mixture-of-Depths")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab import bench

    return bench.main(options.passed_on)  # has its own parser, and so its own --help
