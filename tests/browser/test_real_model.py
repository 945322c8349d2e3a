"""The notebooks with a real model, where MODLAB_SMOLLM2 names a folder of SmolLM2-135M-Instruct."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from modlab.lab import REAL
from tests.browser.conftest import ROOT
from tests.browser.helpers import kernel, wait_preview
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


EXPLORER = """\
import argparse, inspect, modlab
from modlab import lab
lab.quiet()
model, tokenizer = lab.real_model()
explorer = modlab.widgets.explore(model, tokenizer, inspect.getsource(argparse)[:2600])
explorer"""


def test_the_explorer_has_all_90_gates_on_one_screen(
    lab: JupyterLab, notebook: Callable[..., Path], shots: Path
) -> None:
    with lab.open(notebook(EXPLORER, name="gates"), timeout=300) as nb:
        nb.page.set_viewport_size({"width": 1280, "height": 800})
        nb.run_all()
        view = nb.page.locator(".modlab[data-view=explorer]")
        view.evaluate("e => e.scrollIntoView()")
        heatmap = view.locator("canvas.modlab-heatmap")
        assert "30 of them routed, 90 KV heads" in (heatmap.get_attribute("aria-label") or "")
        assert heatmap.evaluate("e => e.getBoundingClientRect().bottom") < 740
        assert "dense layer" not in view.locator(".mod-key").inner_text()
        kept = float(heatmap.get_attribute("data-kept") or 0)
        nb.drag(".modlab-threshold", 2.0, release=False)  # one in four
        wait_preview(nb)
        assert float(heatmap.get_attribute("data-kept") or 0) == pytest.approx(0.25, abs=0.02) and kept > 0.4
        nb.page.mouse.up()
        nb.page.wait_for_function(
            "() => document.querySelector('.modlab-badge').dataset.state === 'measured'"
        )
        nb.wait_idle()
        assert float(kernel(nb, "explorer.summary['dense_bytes'] / explorer.summary['kv_bytes']")) > 2
        for theme in ("Light", "Dark"):
            nb.theme(f"JupyterLab {theme}")
            view.evaluate("e => e.scrollIntoView()")
            nb.page.screenshot(path=shots / f"real-explorer-{theme.lower()}.png")
        nb.theme("JupyterLab Light")
        nb.check()
