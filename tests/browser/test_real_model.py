"""The notebooks with a real model, where MODLAB_SMOLLM2 names a folder of SmolLM2-135M-Instruct."""

import os
import re
from pathlib import Path

import pytest

from modlab.lab import REAL
from tests.browser.conftest import ROOT
from tests.browser.notebook_browser import JupyterLab, Notebook
from tests.helpers.notebook_promises import PROMISES

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not os.environ.get(REAL), reason=f"{REAL} names no real model"),
]
# What the real model's cells show, and say.
SHOWN = {
    "quickstart": ("cache", 2, "found"),
    "1_convert": ("heatmap", 1, r"all 30 layers[\s\S]*30 of 30 layers routed, 90 gates, kv_saving"),
    "2_train": ("cache", 1, r"Reading 1,536 tokens"),
    "3_where_tokens_go": ("cache", 1, r"8,192 tokens"),
    "4_thresholds": ("cache", 1, "found"),
    "5_what_it_buys": ("frontier", 2, r"SmolLM2|smollm2-kv"),
}


def opened(lab: JupyterLab, name: str, folder: Path) -> Notebook:
    """A context: the notebook, which works in an empty folder."""
    return lab.open(ROOT / "notebooks" / f"{name}.ipynb", timeout=600, cwd=folder)


@pytest.mark.parametrize("name", SHOWN)
def test_its_cells_run_and_show_the_real_model(
    lab: JupyterLab, tmp_path: Path, shots: Path, name: str
) -> None:
    view, count, says = SHOWN[name]
    with opened(lab, name, tmp_path) as nb:
        nb.run_all()
        said = nb.text().replace("\t", " ")
        assert "No real model here" not in said and re.search(says, said), said
        assert all(re.search(promise, said) for promise in PROMISES[name])
        nb.expect(f".modlab[data-view={view}]", count=count)
        assert nb.page.locator(".modlab-error:visible").count() == 0
        nb.screenshot(shots / f"real-{name}")
        nb.check()


def test_a_planted_number_is_found_and_lost_as_the_slider_moves(
    lab: JupyterLab, tmp_path: Path, shots: Path
) -> None:
    with opened(lab, "4_thresholds", tmp_path) as nb:
        nb.run_all()
        view = ".modlab[data-view=cache]"
        box, answer = nb.page.locator(view), f"{view} .modlab-answer"
        assert nb.page.locator(answer).inner_text() == "✓ found"  # everything is kept
        for halvings, becomes in ((4, "✗ lost"), (0, "✓ found")):
            nb.drag(f"{view} .modlab-threshold", halvings)
            nb.page.wait_for_function(
                "([css, text]) => document.querySelector(css).textContent === text",
                arg=[answer, becomes],
                timeout=120_000,
            )
            nb.wait_idle()
            box.screenshot(path=shots / f"real-answer-{halvings}.png")
        nb.check()
