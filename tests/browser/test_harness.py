"""The harness must fail where a person would see a failure: each notebook here is broken in its own way."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.notebook_browser import JupyterLab, NotebookFailure

pytestmark = pytest.mark.browser

WIDGET = "import anywidget\nclass W(anywidget.AnyWidget):\n    _esm = '''export default {{ {} }}'''\nW()"
CALLBACK = """\
import anywidget
class W(anywidget.AnyWidget):
    _esm = '''export default { render({model, el}) {
        el.innerHTML = "<input type=range class=knob min=0 max=1 step=0.01 value=0>";
        el.firstChild.addEventListener("change", e => model.send(Number(e.target.value)));
    } }'''
w = W()
def heard(widget, content, buffers):
    raise RuntimeError(f"callback exploded at {content}")
w.on_msg(heard)
w"""

BROKEN = {
    "cell error": ("def inner():\n    raise ValueError('deliberate 42')\ninner()", "deliberate 42"),
    "javascript error": (
        WIDGET.format("render({model, el}) { throw new Error('deliberate JS'); }"),
        "deliberate JS",
    ),
    "empty widget": (WIDGET.format("render({model, el}) {}"), "no size"),
    "kernel died": ("import os\nos._exit(3)", "autorestarting"),
    "external request": (
        "from IPython.display import HTML\nHTML('<img src=\"https://example.invalid/x.png\">')",
        "example.invalid",
    ),
    "hidden error": ("import ipywidgets\nwith ipywidgets.Output():\n    raise KeyError('unseen')", "unseen"),
}


# After these nothing else runs; the others are told apart by kind and text, and share a notebook.
ENDING = ("cell error", "kernel died")


@pytest.mark.parametrize(
    "kinds",
    [*[(kind,) for kind in ENDING], tuple(kind for kind in BROKEN if kind not in ENDING)],
    ids="+".join,
)
def test_what_a_person_sees_is_found(
    lab: JupyterLab, notebook: Callable[..., Path], kinds: tuple[str, ...]
) -> None:
    with pytest.raises(NotebookFailure) as failure:
        with lab.open(notebook(*(BROKEN[kind][0] for kind in kinds)), timeout=60) as nb:
            nb.run_all()
    found = failure.value.problems
    for kind in kinds:
        assert any(p["kind"] == kind and BROKEN[kind][1] in p["text"] for p in found), failure.value


def test_a_callback_that_raises_is_found(lab: JupyterLab, notebook: Callable[..., Path]) -> None:
    with lab.open(notebook(CALLBACK), timeout=60) as nb:
        nb.run_all()
        assert nb.drag(".knob", 0.5) == pytest.approx(0.5, abs=0.1)
        nb.wait_idle()
        with pytest.raises(NotebookFailure, match="callback exploded at 0"):
            nb.check()


def test_a_hung_cell_is_named(lab: JupyterLab, notebook: Callable[..., Path]) -> None:
    with pytest.raises(NotebookFailure, match=r"still running after 6 s:\nimport time"):
        with lab.open(notebook("import time\ntime.sleep(10_000)"), timeout=6) as nb:
            nb.run_all()


def test_a_good_notebook_passes(lab: JupyterLab, notebook: Callable[..., Path]) -> None:
    sources = ("print('first')", WIDGET.format("render({model, el}) { el.textContent = 'drawn'; }"))
    with lab.open(notebook(*sources), timeout=60) as nb:
        nb.run_all()
        assert "first" in nb.text() and "drawn" in nb.text()
        assert nb.python("print(6 * 7)") == "42\n"
        with pytest.raises(NotebookFailure, match="ZeroDivisionError"):
            nb.python("1 / 0")
