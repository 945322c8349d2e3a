"""Writes notebooks/*.ipynb from scripts/notebooks/*.py, one file a notebook, in the percent format.

`# %%` begins a code cell, `# %% folded` one whose source is folded away in JupyterLab, `# %% [markdown]` one
of text, whose lines are comments.

    python scripts/make_notebooks.py              all: run in a real JupyterLab, save with pictures
    python scripts/make_notebooks.py 2_train      only this one
    python scripts/make_notebooks.py --bare       write the cells only, without outputs

A saved notebook shows its pictures where nothing runs: as SVG on GitHub and in nbviewer, as PNG in a
JupyterLab that does not trust it. Running needs Chromium and the test extra.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "scripts" / "notebooks"
FOLDER = ROOT / "notebooks"

FOLDED = {"jupyter": {"source_hidden": True}}

# What a path of the machine that saved the notebook looks like.
MACHINE = re.compile(r"/home/|/root/|/tmp/|/work\b|/Users/|site-packages|C:\\\\")


def sources() -> dict[str, Path]:
    """Notebook name (without suffix) -> its source."""
    return {path.stem: path for path in sorted(SOURCES.glob("*.py"))}


def cells(source: Path) -> list[tuple[str, str]]:
    """(type, text) of each cell of a source; the type of a folded one is "folded"."""
    # Not with jupytext: it brings an extension into JupyterLab, and tests are to see what users see.
    found = []
    for part in re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, text = part.partition("\n")
        if "[markdown]" in head:
            found.append(("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.M)))
        else:
            found.append(("folded" if "folded" in head else "code", text.strip()))
    return found


def build(parts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The notebook of these (type, text) cells, without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(parts):
        cell: dict[str, Any] = {
            "id": f"cell-{number:02d}",
            "cell_type": "code" if kind == "folded" else kind,
            "metadata": FOLDED if kind == "folded" else {},
            "source": text,
        }
        if kind != "markdown":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write(path: Path, notebook: dict[str, Any]) -> None:
    """Write it as Jupyter does: sources as lists of lines, one space of indent."""
    for cell in notebook["cells"]:
        if isinstance(cell["source"], str):
            cell["source"] = cell["source"].splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def is_kept(output: dict[str, Any]) -> bool:
    """Whether an output says something where nothing runs: not a bare widget (a progress bar), not stderr."""
    data = output.get("data", {})
    bare = "application/vnd.jupyter.widget-view+json" in data and "image/svg+xml" not in data
    return not bare and output.get("name") != "stderr"


def add_png(browser: Any, outputs: Iterable[dict[str, Any]]) -> None:
    """A PNG of each SVG: JupyterLab draws the latter in notebooks that it trusts only."""
    for output in outputs:
        data = output.get("data", {})
        if "image/svg+xml" not in data:
            continue
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.set_content("".join(data["image/svg+xml"]))
        data["image/png"] = base64.b64encode(page.locator("svg").screenshot()).decode("ascii")
        page.close()


def run(lab: Any, path: Path, notebook: dict[str, Any]) -> None:
    """Run it in a real JupyterLab and keep the outputs; an older file stays as it is if a cell fails."""
    # The kernel works in an empty folder: what a notebook writes is no part of the repository.
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / path.name
        write(bare, notebook)
        with lab.open(bare, timeout=300) as nb:
            nb.run_all()
            nb.wait_idle()
            saved = json.loads(nb.save(bare).read_text())
            seconds = nb.timings["run all"]
    # State of widgets that no kernel backs would show a slider that measures nothing; the picture remains.
    saved["metadata"].pop("widgets", None)
    for cell in saved["cells"]:
        cell["metadata"] = FOLDED if "jupyter" in cell["metadata"] else {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if is_kept(output)]
            add_png(lab.browser, cell["outputs"])
    if found := MACHINE.search(json.dumps([cell.get("outputs", []) for cell in saved["cells"]])):
        raise SystemExit(f"{path.name}: an output names a folder of this machine ({found[0]!r})")
    write(path, saved)
    print(f"{path.relative_to(ROOT)}: ran in {seconds:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks to make; all by default")
    parser.add_argument("--bare", action="store_true", help="cells only, run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(sources()):
        parser.error(f"no source {', '.join(sorted(unknown))}; there are {', '.join(sources())}")
    chosen = {name: path for name, path in sources().items() if name in (arguments.names or sources())}
    made = {FOLDER / f"{name}.ipynb": build(cells(source)) for name, source in chosen.items()}
    if arguments.bare:
        for path, notebook in made.items():
            write(path, notebook)
        return
    sys.path.insert(0, str(ROOT / "tests" / "browser"))
    with importlib.import_module("notebook_browser").JupyterLab() as lab:
        for path, notebook in made.items():
            run(lab, path, notebook)


if __name__ == "__main__":
    main()
