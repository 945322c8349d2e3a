"""The notebooks: what is committed is what the sources say, and each of them runs and keeps its promises."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

import modlab
from modlab import lab
from tests.helpers.notebook_promises import PROMISES

ROOT = Path(__file__).resolve().parents[1]


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts" / "make_notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = maker()
NAMES = list(MAKER.sources())


def saved(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))


def said(notebook: Any) -> str:
    """Everything the outputs say in plain text."""
    parts = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            parts += ["".join(text) for text in texts]
    return "\n".join(parts)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_those_of_the_source(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [("folded" if cell.metadata else cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == MAKER.cells(MAKER.sources()[name]), f"run python scripts/make_notebooks.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_notebook_ran_and_shows_pictures_where_nothing_runs(name: str) -> None:
    notebook = saved(name)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 1_000_000
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), f"run python scripts/make_notebooks.py {name}"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    data = [o.get("data", {}) for o in outputs]
    widgets = [d for d in data if "application/vnd.jupyter.widget-view+json" in d]
    plotted = [d for d in data if "application/vnd.plotly.v1+json" in d]
    assert widgets or plotted
    assert all("image/png" in d for d in [*widgets, *plotted])  # an untrusted JupyterLab shows no SVG
    assert all("".join(d["image/svg+xml"]).startswith("<svg") for d in widgets)
    assert "widgets" not in notebook["metadata"], "state of widgets that no kernel backs"
    for promise in PROMISES[name]:
        assert re.search(promise, said(notebook)), promise


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_folder_of_a_machine(name: str) -> None:
    notebook = saved(name)
    everything = [notebook["metadata"], *([c["metadata"], c.get("outputs")] for c in notebook["cells"])]
    assert not MAKER.MACHINE.search(json.dumps(everything))


def test_every_notebook_is_listed() -> None:
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES) == set(PROMISES)
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    for guide in lab.guides(ROOT / "notebooks"):
        assert f"({guide.file}) | {guide.summary} |" in readme
    quickstart = "".join("".join(cell["source"]) for cell in saved("quickstart")["cells"])
    assert all(f"({name}.ipynb)" in quickstart for name in NAMES if name != "quickstart")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere_and_a_model_of_ones_own_has_its_place(name: str) -> None:
    text = "\n".join(text for kind, text in MAKER.cells(MAKER.sources()[name]) if kind == "markdown")
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", text)
    assert targets and all((ROOT / "notebooks" / target).exists() for target in targets)
    code = "\n".join(text for kind, text in MAKER.cells(MAKER.sources()[name]) if kind != "markdown")
    assert re.search(r'^(MODEL|NAME)\b.* = "demo', code, re.M)
    assert "your own" in text.lower() or "your own" in code.lower()


def test_dead_widgets_are_dropped_and_pictures_stay() -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "Loading: 0%"}
    assert not MAKER.is_kept({"output_type": "display_data", "data": view})
    assert MAKER.is_kept({"output_type": "display_data", "data": {**view, "image/svg+xml": "<svg>"}})
    assert MAKER.is_kept({"output_type": "stream", "name": "stdout", "text": "hello"})
    assert not MAKER.is_kept({"output_type": "stream", "name": "stderr", "text": "50%"})


@pytest.mark.long  # tests/browser runs each in a real JupyterLab, against the same promises
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_keeps_its_promises(name: str, tmp_path: Path) -> None:
    bare = tmp_path / f"{name}.ipynb"
    MAKER.write(bare, MAKER.build(MAKER.cells(MAKER.sources()[name])))
    done = lab.execute(bare, timeout_s=200, progress=False)
    assert done.error is None, done.error
    output = said(json.loads(done.notebook.read_text(encoding="utf-8")))
    for promise in PROMISES[name]:
        assert re.search(promise, output), f"{promise} in\n{output}"


def with_model(name: str, **names: str) -> list[tuple[str, str]]:
    """The cells of a notebook with another model put where the demo's name stands."""
    cells = []
    for kind, text in MAKER.cells(MAKER.sources()[name]):
        if kind != "markdown":
            for demo, other in names.items():
                place = rf'^((?:MODEL|NAME)\b.*)"{demo.replace("_", "-")}"'
                text = re.sub(place, rf"\1{other!r}", text, flags=re.M)
        cells.append((kind, text))
    return cells


@pytest.mark.data
@pytest.mark.timeout(1200)
@pytest.mark.long
def test_a_model_of_ones_own_is_converted_and_trained(data_dir: Path, tmp_path: Path) -> None:
    """A dense model of somebody else is converted, trained, and saved where other notebooks look for it."""
    dense = str(data_dir / "models" / "stories260K")
    for name in ("1_convert", "2_train"):
        bare = tmp_path / f"{name}.ipynb"
        MAKER.write(bare, MAKER.build(with_model(name, demo_dense=dense)))
        done = lab.execute(bare, timeout_s=200, progress=False)
        assert done.error is None, f"{name}: {done.error}"
    model, _ = modlab.load(tmp_path / "my-mod-model")
    assert modlab.is_converted(model)
