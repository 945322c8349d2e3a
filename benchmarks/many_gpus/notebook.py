"""Notebook 6, run without Jupyter: its cells one after another, with what they print and show as outputs."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAME = "6_many_gpus.ipynb"


def executed(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the notebook's cells in a folder of their own; the notebook with outputs lies next to it.

    `notebook_launcher` forks: nothing here may touch a GPU before it does.
    """
    notebook = json.loads((ROOT / "notebooks" / NAME).read_text(encoding="utf-8"))
    folder = options.work / "notebook"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: list[str] = []
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        text = _Shared()
        with contextlib.redirect_stdout(text):
            value = _run("".join(cell["source"]), names)
        cell["execution_count"], cell["outputs"] = count, []
        if said := text.getvalue():
            printed.append(said)
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": said})
        if value is not None:
            data, own = _shown(value), {"output_type": "execute_result", "execution_count": count}
            cell["outputs"].append({**own, "metadata": {}, "data": data})
        file: Path = options.work / NAME  # again after each cell
        file.write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")
    return {"cells": count, "printed": printed}


class _Shared(io.StringIO):
    """Output that is also seen in the log."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def _run(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last line if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NAME, "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), NAME, "eval"), names)


def _shown(value: Any) -> dict[str, Any]:
    """A value as a notebook's output holds it."""
    data: dict[str, Any] = {"text/plain": repr(value)[:2000]}
    if hasattr(value, "to_plotly_json"):
        data = {"text/plain": type(value).__name__}
        data["application/vnd.plotly.v1+json"] = json.loads(value.to_json())
    elif hasattr(value, "to_html"):
        data["text/html"] = value.to_html()
    return data
