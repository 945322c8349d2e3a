"""The training panel in a real JupyterLab: it trains while other cells run, pauses, resumes and stops by
click, whether or not the kernel answers widgets while a cell runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.helpers import CURVES, MODEL, until
from tests.browser.notebook_browser import JupyterLab, Notebook

pytestmark = pytest.mark.browser

SETUP = f"""\
{MODEL}import time, torch
batches = [{{"input_ids": torch.randint(3, 500, (2, 32))}} for _ in range(2000)]
panel = modlab.widgets.TrainingPanel(model, batches, modlab.TrainConfig(steps=2000, log_every=2))
panel"""
# JupyterLab answers widgets in a thread of their own, while a cell runs; other front ends do not.
ONE_THREAD = """() => {
  window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.commsOverSubshells = 'disabled'; }"""


def state(nb: Notebook, name: str) -> None:
    nb.page.wait_for_function(
        "name => document.querySelector('[data-view=training] .modlab-badge')?.innerText === name", arg=name
    )


WAIT = "panel.start()\nresult = panel.wait()\nprint('ended:', result.stopped)"


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, notebook: Callable[..., Path]) -> Iterator[Notebook]:
    """The panel, and a cell that waits for it; each test leaves the panel stopped."""
    with lab.open(notebook(SETUP, WAIT, name="training"), timeout=120) as nb:
        run_cell(nb, 0)
        nb.wait_idle()
        yield nb
        nb.check()


def run_cell(nb: Notebook, index: int) -> None:
    """Begin to run one cell, as Shift+Enter does."""
    nb.page.evaluate(
        """index => { const content = window.jupyterapp.shell.currentWidget.content;
          content.activeCellIndex = index; content.deselectAll();
          window.jupyterapp.commands.execute('notebook:run-cell'); }""",
        index,
    )


def start_pause_resume_stop(nb: Notebook, shot: Path, subshells: bool) -> None:
    nb.python(
        "import threading\nthreads = set()\n"
        "panel.on_msg(lambda *_: threads.add(threading.current_thread().name))"
    )
    box = nb.page.locator("[data-view=training]")
    box.locator(".modlab-start").click()
    state(nb, "running")
    nb.page.wait_for_selector("[data-view=training] svg.modlab-curve")
    assert nb.python("print(1 + 1, panel.running)").strip() == "2 True"  # the kernel is free
    box.locator(".modlab-pause").click()
    state(nb, "paused")
    steps = nb.python("time.sleep(0.5); print(len(panel.history))")
    assert nb.python("time.sleep(0.5); print(len(panel.history))") == steps
    assert box.locator(".modlab-pause").inner_text() == "Resume"
    box.locator(".modlab-pause").click()
    state(nb, "running")
    until(nb, f"len(panel.history) > {int(steps)}")
    nb.page.wait_for_function("() => /left/.test(document.querySelector('[data-view=training]').innerText)")
    nb.screenshot(shot)
    box.locator(".modlab-stop").click()
    state(nb, "stopped")
    assert nb.python("print(panel.wait().stopped)").strip() == "interrupted"
    threads = eval(nb.python("print(threads)"))
    assert all(name.startswith("subshell") == subshells for name in threads)
    assert "Train on" in box.locator(".modlab-start").inner_text()


def test_start_pause_resume_stop(nb: Notebook, shots: Path) -> None:
    start_pause_resume_stop(nb, shots / "training-subshells", True)


def test_curves_of_as_many_lines_are_drawn_again(nb: Notebook) -> None:
    before = nb.page.evaluate(CURVES)
    nb.python(
        "import numpy as np\n"
        "kept, rows = panel.series, np.frombuffer(panel.series, '<f4').reshape(len(panel.columns), -1)\n"
        "panel.series = rows[:, ::-1].tobytes()"
    )
    nb.page.wait_for_function(f"before => ({CURVES})() !== before", arg=before)
    nb.python("panel.series = kept")
    nb.page.wait_for_function(f"before => ({CURVES})() === before", arg=before)


NAMES = """() => [...document.querySelectorAll('[data-view=training] svg.modlab-curve')].at(-1)
  .querySelectorAll('text[text-anchor=start].mod-tick').values().map(e => e.getBBox())
  .map(b => [b.y, b.height]).toArray().sort((a, b) => a[0] - b[0])"""


def test_names_of_many_layers_stay_next_to_the_curves(nb: Notebook, shots: Path) -> None:
    """A real model has thirty layers: names without room are told by pointing, and none lies over others."""
    nb.python(
        "before = panel.columns, panel.series\n"
        "layers = [f'keep_{i}' for i in range(40)]\n"
        "ends = np.linspace(0.02, 0.98, 40)[(np.arange(40) * 7) % 40]\n"
        "rows = np.stack([[1, 2], [2.5, 2.4], *[[1, end] for end in ends], [1, 0.5], [0.5, 0.5]])\n"
        "panel.columns = ['step', 'loss', *layers, 'keep_ratio', 'target']\n"
        "panel.series = rows.astype('<f4').tobytes()"
    )
    svg = nb.page.locator("[data-view=training] svg.modlab-curve").last
    nb.page.wait_for_function(
        "() => document.querySelectorAll('[data-view=training] polyline.mod-near').length === 42"
    )
    nb.page.screenshot(path=shots / "training-many-layers.png")
    names = nb.page.evaluate(NAMES)
    assert 8 <= len(names) <= 17  # not all forty
    assert names[0][0] >= 14 and names[-1][0] + names[-1][1] <= 230  # within the picture, under its title
    assert all(low[0] - high[0] >= 10.9 for high, low in zip(names, names[1:], strict=False))
    assert {"mean", "target"} <= set(svg.locator("text").all_text_contents())
    told = svg.locator("polyline.mod-near title").all_text_contents()
    assert "layer 39: 83 %" in told and len(told) == 42
    assert "point at a line" in nb.page.locator("[data-view=training]").inner_text()
    nb.python("panel.columns, panel.series = before")


def test_the_same_where_widgets_share_the_kernels_thread(
    lab: JupyterLab, notebook: Callable[..., Path], shots: Path
) -> None:
    with lab.open(notebook(SETUP, name="one_thread"), timeout=120) as nb:
        nb.page.evaluate(ONE_THREAD)
        nb.run_all()
        start_pause_resume_stop(nb, shots / "training-one-thread", False)
        nb.check()


def test_a_cell_that_waits_can_still_be_stopped(nb: Notebook) -> None:
    run_cell(nb, 1)
    state(nb, "running")
    nb.page.locator("[data-view=training] .modlab-stop").click()  # the cell is still running
    state(nb, "stopped")
    nb.wait_idle()
    assert "ended: interrupted" in nb.text()


def test_the_kernels_interrupt_button_stops_it(nb: Notebook) -> None:
    run_cell(nb, 1)  # its old output goes, and "ended" can only be this run's
    state(nb, "running")
    nb.page.wait_for_selector("[data-view=training] svg.modlab-curve")
    nb.page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    state(nb, "stopped")
    nb.wait_idle()
    assert "ended: interrupted" in nb.text()
