"""`modlab lab`: the notebooks, in JupyterLab."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modlab.cli.flags import Command, read_path


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command(
        "lab",
        run,
        "copy the guided notebooks to a folder and open JupyterLab there",
        "A notebook that you changed is never overwritten, unless you ask for it. "
        "JupyterLab gets what follows -- (`modlab lab DIR -- --port=9999`); only this machine can reach it.",
    )
    sub.add_argument(
        "folder", metavar="DIR", nargs="?", type=read_path, default=Path("modlab-notebooks"), help="folder"
    )
    sub.add_argument("--list", action="store_true", help="say what each notebook shows, and do nothing else")
    sub.add_argument(
        "--notebook",
        metavar="NAME",
        default="quickstart",
        help="the notebook to open or to execute, by name or number (see --list); with --execute also 'all'",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace notebooks that were changed")
    sub.add_argument(
        "--no-browser", action="store_true", help="print the address instead of opening a browser"
    )
    sub.add_argument(
        "--execute",
        action="store_true",
        help="only run the notebook, and write NAME.executed.ipynb and NAME.html next to it",
    )
    sub.add_argument(
        "--timeout", metavar="S", type=int, default=600, help="with --execute: longest time for one cell"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab import lab

    if options.list:
        width = max(len(guide.name) for guide in lab.guides())
        for guide in lab.guides():
            print(f"{guide.name:{width}}  {guide.summary}")
        return 0
    everything = options.execute and options.notebook == "all"
    chosen = lab.guides() if everything else [lab.find_guide(options.notebook)]
    for line in lab.copy_notebooks(options.folder, options.overwrite).lines(options.folder):
        print(line)
    if not options.execute:
        print(f"opening {chosen[0].title}; `modlab lab --list` says what the other notebooks show")
        return lab.open_lab(options.folder, not options.no_browser, options.passed_on, chosen[0].file)
    failed = 0
    for guide in chosen:
        done = lab.execute(options.folder / guide.file, timeout_s=options.timeout)
        print(f"executed notebook: {done.notebook}\npage: {done.page}")
        if done.error:
            print(f"\nmodlab: a cell of {guide.file} failed:\n{done.error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0
