"""The quickstart in Jupyter Notebook 7: run, dragged, generated; skipped where `notebook` is not there."""

from pathlib import Path

import pytest

from tests.browser.conftest import ROOT
from tests.browser.helpers import answered, kernel, read, wait_measured, wait_preview
from tests.browser.notebook_browser import JupyterLab, Notebook7

pytestmark = pytest.mark.browser

OF_NOTEBOOK = r"reading 'schema'"
"""A script error of Notebook's own, about settings that were made before it started."""


def test_the_quickstart_runs_and_answers(lab: JupyterLab, tmp_path: Path, shots: Path) -> None:
    pytest.importorskip("notebook")
    path = ROOT / "notebooks" / "quickstart.ipynb"
    with (
        Notebook7(env=lab.extra_env, browser=lab.browser) as notebook,
        notebook.open(path, timeout=240, cwd=tmp_path, ignore_console=[OF_NOTEBOOK]) as nb,
    ):
        nb.run_all()
        p = nb.drag(".modlab-threshold", 0.8, release=False)
        wait_preview(nb)
        assert read(nb, "badge") == "preview"
        nb.page.mouse.up()
        wait_measured(nb, p)
        assert float(kernel(nb, "model.mod.thresholds[model.mod.layers[0]]")) == p
        with answered(nb, "cache"):
            nb.page.locator("[data-view=cache] .modlab-generate").click()
        assert float(kernel(nb, "cache.written['tokens_per_s']")) > 0
        nb.page.screenshot(path=shots / "notebook7.png")
        nb.check()
