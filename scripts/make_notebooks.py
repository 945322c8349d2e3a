"""Writes notebooks/*.ipynb. The cells below are the source; edit them here, then run

    python scripts/make_notebooks.py            write, run in a real JupyterLab, save with pictures
    python scripts/make_notebooks.py --bare     write the cells only, without outputs

A saved notebook shows its pictures where nothing runs (GitHub). Running needs Chromium and the test extra.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"

QUICKSTART = [
    (
        "markdown",
        """\
# modlab quickstart

In a **Mixture-of-Depths** model a token may skip layers. Each routed layer has a small router that gives
every token a gate between 0 and 1; tokens with a gate below the threshold **p** pass the layer by. They cost
no computation there and leave nothing in its KV cache.

This is lossy: a higher p saves more and predicts worse. This notebook shows how much, on your text.
Run all cells (*Run > Run All Cells*); it takes less than a minute on a laptop, without GPU or network.""",
    ),
    (
        "markdown",
        """\
## 1. Load a model

`"demo"` ships with modlab: a small model trained on Python source. `"demo-dense"` is its control: the
same start, trained on for as long without skipping. The last section tells how to use another model.""",
    ),
    (
        "code",
        """\
NAME, DENSE = "demo", "demo-dense"

import modlab

model, tokenizer = modlab.load(NAME)
if not modlab.is_converted(model):
    modlab.convert(model)  # adds open routers: the output stays the same until they are trained

print(f"{model.mod.num_layers} layers, routed: {model.mod.layers}")
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")""",
    ),
    (
        "markdown",
        """\
## 2. Trace a text

Which layers does each token run through? Put in your own text; the demo knows Python best.""",
    ),
    (
        "code",
        '''\
TEXT = \'\'\'\
def read_table(path, delimiter=","):
    """Read a text file and return a list of rows.

    Each row is a list of strings. Empty lines are ignored.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            row = [cell.strip() for cell in line.split(delimiter)]
            if rows and len(row) != len(rows[0]):
                raise ValueError(f"line {number}: expected {len(rows[0])} cells, got {len(row)}")
            rows.append(row)
    return rows


class Counter:
    """Count how often each key was seen."""

    def __init__(self):
        self.counts = {}

    def add(self, key, amount=1):
        self.counts[key] = self.counts.get(key, 0) + amount

    def most_common(self, n=10):
        items = sorted(self.counts.items(), key=lambda item: item[1], reverse=True)
        return items[:n]
\'\'\'

trace = modlab.trace(model, tokenizer, TEXT)
print(trace)
for layer, kept in zip(trace.layers, trace.keep_ratio):
    print(f"layer {layer:2d} keeps {kept:6.1%} of the tokens")''',
    ),
    (
        "markdown",
        """\
## 3. What does a threshold cost, what does it buy?

`sweep` runs the text once for every p. At 0 every gate is open: the same weights, nothing skipped.
`kv_bytes` is what the cache really allocated. The demo's weights were trained at p = 0.5, so there is no
gain in quality to expect from going far below it, and above it the loss rises fast.""",
    ),
    (
        "code",
        """\
sweep = modlab.sweep(
    model, tokenizer, [TEXT],
    thresholds=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    repeats=0,  # 5, for example, adds prefill and decode times; they mean little on a short text
    progress=False,
)
sweep[["threshold", "keep_ratio", "kv_bytes", "kv_saving", "loss", "perplexity"]].round(3)""",
    ),
    (
        "markdown",
        """\
## 4. Steer it

- **Drag** the slider: a *preview*, made in the browser from the gates recorded in the last run.
- **Release** it: the model takes the new threshold and runs the text; the figures are then *measured*.
- Point at a cell or a token to see its gate; a click locks it, Escape frees it. Arrow keys work too.
- A click on a layer's number colours the text by that layer.""",
    ),
    (
        "code",
        """\
modlab.widgets.explore(model, tokenizer, TEXT, sweep)""",
    ),
    (
        "markdown",
        """\
## 5. Generate, and count the bytes

`model.generate` works as always and stores keys and values of kept tokens only. `KVTracker` reads what the
cache allocates, for any Hugging Face model. Here both models continue the text; the threshold is the one that
the slider was left at. Neither is a good programmer: they are very small.""",
    ),
    (
        "code",
        """\
import pandas as pd

dense_model, _ = modlab.load(DENSE)
inputs = tokenizer(TEXT + "\\n    def total(self", return_tensors="pt")
length = inputs["input_ids"].shape[1]

rows = {}
for label, which in (("dense", dense_model), ("Mixture-of-Depths", model)):
    with modlab.KVTracker(which) as kv:
        output = which.generate(**inputs, max_new_tokens=80, do_sample=False)
    last = kv.frame().query("step == step.max()")
    rows[label] = dict(last[["kept_tokens", "kv_bytes", "dense_kv_bytes"]].sum())
    rows[label]["loss of TEXT"] = modlab.measure.loss(which, tokenizer, [TEXT])
    print(f"--- {label}")
    print("    def total(self" + tokenizer.decode(output[0, length:], skip_special_tokens=True))

table = pd.DataFrame(rows).T
table["kv_saving"] = table.dense_kv_bytes / table.kv_bytes
table.astype({"kept_tokens": int, "kv_bytes": int, "dense_kv_bytes": int}).round(3)""",
    ),
    (
        "markdown",
        """\
`kept_tokens` counts tokens over all layers. A growing cache keeps a few free places for coming tokens;
`kv_bytes` includes them, so the saving is a little smaller than the share of kept tokens alone would give.

## 6. Your own model

Change the names in the first code cell and run all cells again:

- `NAME`: a folder saved by modlab, any local folder of a `transformers` model, or a hub id such as
  `"Qwen/Qwen3-0.6B"` (needs network); `DENSE`: the model to compare with, for example the same name.
- A dense model is converted on the spot and, at first, keeps every token: its routers still have to learn.
  `modlab train --help` and `modlab.train` teach them; `model.save_pretrained(folder)` saves the result.

Keep what you saw: `trace.save("my_text.npz")`, or a page that opens without Jupyter:""",
    ),
    (
        "code",
        """\
from pathlib import Path

page = Path("routing.html")
page.write_text(trace.to_html(), encoding="utf-8")
print(f"{page} written, {page.stat().st_size / 1e3:.0f} kB")""",
    ),
]

NOTEBOOKS = {"quickstart.ipynb": QUICKSTART}


def build(cells: list[tuple[str, str]]) -> dict[str, Any]:
    """The notebook of these (type, source) cells, without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells):
        cell: dict[str, Any] = {
            "id": f"cell-{number:02d}",
            "cell_type": kind,
            "metadata": {},
            "source": source,
        }
        if kind == "code":
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


def is_bare_widget(output: dict[str, Any]) -> bool:
    """A widget without a picture of itself, such as a progress bar: dead text where nothing runs."""
    data = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and "image/png" not in data


def run(path: Path) -> None:
    """Run it in a real JupyterLab and keep the outputs; the original stays as it is if a cell fails."""
    sys.path.insert(0, str(ROOT / "tests" / "browser"))
    JupyterLab = importlib.import_module("notebook_browser").JupyterLab

    # The kernel works in an empty folder: what a notebook writes is no part of the repository.
    with tempfile.TemporaryDirectory() as folder, JupyterLab() as lab, lab.open(path, cwd=folder) as nb:
        nb.run_all()
        saved = json.loads(nb.save(Path(folder) / path.name).read_text())
    # State of widgets that no kernel backs would show a slider that measures nothing; the picture remains.
    saved["metadata"].pop("widgets", None)
    for cell in saved["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if not is_bare_widget(output)]
    write(path, saved)


def main() -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bare", action="store_true", help="cells only, run nothing")
    arguments = parser.parse_args()
    for name, cells in NOTEBOOKS.items():
        path = FOLDER / name
        write(path, build(cells))
        if not arguments.bare:
            run(path)
        print(f"{path.relative_to(ROOT)}: {len(cells)} cells, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
