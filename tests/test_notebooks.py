"""The committed notebooks are what scripts/make_notebooks.py writes, and name no folder of a machine."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts" / "make_notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = maker()


@pytest.mark.parametrize("name", MAKER.NOTEBOOKS)
def test_cells_are_those_of_the_script(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == MAKER.NOTEBOOKS[name]


@pytest.mark.parametrize("name", MAKER.NOTEBOOKS)
def test_outputs_name_no_folder_of_a_machine(name: str) -> None:
    notebook = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook["cells"]])
    for trace_of_a_machine in ("/home/", "/root/", "/tmp/", "/work", "site-packages"):
        assert trace_of_a_machine not in outputs


def test_every_notebook_is_listed() -> None:
    found = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert found == set(MAKER.NOTEBOOKS)
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in readme for name in found)


def test_dead_widgets_are_dropped_and_pictures_stay() -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "Loading: 0%"}
    assert MAKER.is_bare_widget({"output_type": "display_data", "data": view})
    assert not MAKER.is_bare_widget({"output_type": "display_data", "data": {**view, "image/png": "..."}})
    assert not MAKER.is_bare_widget({"output_type": "stream", "text": "hello"})
