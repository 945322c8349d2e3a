"""The browser's half of one view: the files of js/ that it needs, put together to one ES module.

A file of js/ names what it builds on in a line `// uses: store raster`, as an import would, and a view
registers itself, `VIEWS.heatmap = {...}`. A real import would need a server that has the other files; a saved
notebook and a page have none.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

JS = Path(__file__).parents[1] / "js"
GRID = 10_000  # gates reach the browser in steps of 1/GRID

# Viridis at nine equal steps (matplotlib's values): luminance grows evenly, so it reads in grey and for the
# colour-blind. Pictures on a light ground use it from the other end.
RAMP = [
    [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
]  # fmt: skip

_USES = re.compile(r"^// uses: (.+)$", re.M)


@cache
def script(view: str) -> str:
    """The ES module that draws `view`: the code of its file and of those it uses, without comments and
    indents, and no more: each saved widget has a copy."""
    head = {"VIEW": view, "GRID": GRID, "RAMP": RAMP, "VIEWS": {}}
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in head.items())
    lines = (line.strip() for name in files(view) for line in _read(name).splitlines())
    return constants + "".join(f"{line}\n" for line in lines if line and not line.startswith("//"))


def files(view: str) -> list[str]:
    """Names of the files of js/ that `view` needs, each after those that it uses."""
    found = ["helpers", "scene"]

    def add(name: str) -> None:
        if name not in found:
            for other in _USES.findall(_read(name)):
                for used in other.split():
                    add(used)
            found.append(name)

    add(view)
    return [*found, "render"]


def styles() -> str:
    """The style sheet of all views."""
    return (JS / "style.css").read_text(encoding="utf-8")


def _read(name: str) -> str:
    return (JS / f"{name}.js").read_text(encoding="utf-8")
