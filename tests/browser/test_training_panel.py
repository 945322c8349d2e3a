"""The training panel in a real JupyterLab: it trains while other cells run, pauses, resumes and stops by
click, whether or not the kernel answers widgets while a cell runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .notebook_browser import JupyterLab

pytestmark = pytest.mark.browser

SETUP = """\
import time, torch, modlab
from tests.conftest import routed_llama
model = routed_llama()
batches = [{"input_ids": torch.randint(3, 500, (2, 32))} for _ in range(2000)]
panel = modlab.widgets.TrainingPanel(model, batches, modlab.TrainConfig(steps=2000, log_every=2))
panel"""
# JupyterLab answers widgets in a thread of their own, while a cell runs; other front ends do not.
ONE_THREAD = """() => {
  window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.commsOverSubshells = 'disabled'; }"""


def state(nb: object, name: str) -> None:
    nb.page.wait_for_function(  # type: ignore[attr-defined]
        "name => document.querySelector('[data-view=training] .modlab-badge')?.innerText === name", arg=name
    )


@pytest.mark.parametrize("subshells", [True, False], ids=["subshells", "one thread"])
def test_start_pause_resume_stop(
    lab: JupyterLab, notebook: Callable[..., Path], shots: Path, subshells: bool
) -> None:
    with lab.open(notebook(SETUP, name="training"), timeout=120) as nb:
        if not subshells:
            nb.page.evaluate(ONE_THREAD)
        nb.run_all()
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
        nb.page.wait_for_timeout(1000)
        assert int(nb.python("print(len(panel.history))")) > int(steps)
        nb.page.wait_for_function(
            "() => /left/.test(document.querySelector('[data-view=training]').innerText)"
        )
        nb.screenshot(shots / f"training-{'subshells' if subshells else 'one-thread'}")
        box.locator(".modlab-stop").click()
        state(nb, "stopped")
        assert nb.python("print(panel.wait().stopped)").strip() == "interrupted"
        threads = eval(nb.python("print(threads)"))
        assert all(name.startswith("subshell") == subshells for name in threads)
        assert "Train on" in box.locator(".modlab-start").inner_text()
        nb.check()


def test_a_cell_that_waits_can_still_be_stopped(lab: JupyterLab, notebook: Callable[..., Path]) -> None:
    wait = "panel.start()\nresult = panel.wait()\nprint('ended:', result.stopped)"
    with lab.open(notebook(SETUP, wait, name="waiting"), timeout=120) as nb:
        nb.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        state(nb, "running")
        nb.page.locator("[data-view=training] .modlab-stop").click()  # the cell is running meanwhile
        state(nb, "stopped")
        nb.wait_idle()
        assert "ended: interrupted" in nb.text()
        nb.check()


def test_the_kernels_interrupt_button_stops_it(lab: JupyterLab, notebook: Callable[..., Path]) -> None:
    wait = "panel.start()\nresult = panel.wait()\nprint('ended:', result.stopped)"
    with lab.open(notebook(SETUP, wait, name="interrupt"), timeout=120) as nb:
        nb.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        state(nb, "running")
        nb.page.wait_for_selector("[data-view=training] svg.modlab-curve")
        nb.page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
        state(nb, "stopped")
        nb.wait_idle()
        assert "ended: interrupted" in nb.text()
        nb.check()
