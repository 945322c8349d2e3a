"""The quickstart as a user meets it: run all, drag, release; and as a reader meets it who runs nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.conftest import ROOT
from tests.browser.helpers import BRIGHT_LABELS, kernel, read, wait_measured, wait_preview
from tests.browser.notebook_browser import BROKEN_WIDGET_TEXT, JupyterLab, Notebook
from tests.helpers.notebook_promises import PROMISES

pytestmark = pytest.mark.browser
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    # The kernel works in an empty folder: the notebook writes a page next to itself.
    with lab.open(QUICKSTART, timeout=240, cwd=tmp_path_factory.mktemp("quickstart")) as nb:
        nb.run_all()
        yield nb
        nb.check()


def test_run_all_shows_the_explorer(nb: Notebook) -> None:
    """JupyterLab scrolls to the end of the notebook, far below it."""
    nb.python("widget = explorer")
    assert kernel(nb, "widget.sought") == "False"  # the browser has said that it is in sight
    box = nb.page.locator(".modlab[data-view=explorer]").bounding_box()
    assert box and 0 < box["y"] < 200


def test_it_runs_and_keeps_its_promises(nb: Notebook, shots: Path) -> None:
    nb.screenshot(shots / "quickstart")
    for css in (".modlab-threshold", "canvas.modlab-heatmap", ".modlab-text"):
        nb.expect(css)
    nb.expect("svg.modlab-curve", count=4)
    assert nb.page.locator(".modlab-error:visible").count() == 0 and "kept_tokens" in nb.text()
    assert all(re.search(promise, nb.text()) for promise in PROMISES["quickstart"])


def test_the_threshold_steers_picture_bytes_and_loss(nb: Notebook, shots: Path) -> None:
    nb.python("widget = explorer")
    before = {what: read(nb, what) for what in ("kept", "kv", "loss")}
    heatmap, text = nb.pixels("canvas.modlab-heatmap"), nb.pixels(".modlab-text")
    p = nb.drag(".modlab-threshold", 0.95, release=False)
    wait_preview(nb)
    assert read(nb, "badge") == "preview" and read(nb, "kept") != before["kept"]
    nb.page.screenshot(path=shots / "quickstart-preview.png")
    nb.page.mouse.up()
    wait_measured(nb, p)
    assert read(nb, "badge") == "measured"
    after = {what: read(nb, what) for what in ("kept", "kv", "loss")}
    assert all(after[what] != before[what] for what in after)
    assert nb.pixels("canvas.modlab-heatmap") != heatmap and nb.pixels(".modlab-text") != text
    assert after["loss"] == kernel(nb, "f\"{widget.summary['loss']:.3f}\"")
    # More is skipped, fewer bytes are allocated, and the text is predicted worse: what the notebook says.
    assert float(after["loss"]) > float(before["loss"])
    assert float(kernel(nb, "model.mod.thresholds[model.mod.layers[0]]")) == p
    nb.page.screenshot(path=shots / "quickstart-measured.png")


def test_a_text_of_ones_own_and_a_memory_budget(nb: Notebook, shots: Path) -> None:
    """What a new user comes for: which layers my text skips, the threshold for a budget, its cost."""
    nb.page.locator(".modlab-own-text").first.click()
    own = "It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 12
    nb.page.locator(".modlab-own-area").first.fill(own)
    nb.page.locator(".modlab-run-text").first.click()
    nb.page.wait_for_function(
        "own => document.querySelector('.modlab-text').textContent === own", arg=own, timeout=60_000
    )
    nb.python("widget.wait()")
    nb.wait_idle()
    assert kernel(nb, "len(widget.points)") == "10"  # the curve is that of the new text
    nb.page.locator(".modlab-want-mib").fill("14")
    nb.page.locator(".modlab-calibrate-kv").click()
    nb.page.wait_for_function("() => document.querySelector('.modlab-badge').dataset.state === 'measured'")
    nb.python("widget.wait()")
    nb.wait_idle()
    says = re.search(r"tokens takes ([\d.]+) MiB", nb.page.locator(".modlab-budget-says").first.inner_text())
    assert says and float(says[1]) == pytest.approx(14, abs=0.3)
    nb.python("from modlab.cache.stored import keep_ratio_for")
    want = float(kernel(nb, "keep_ratio_for(model, kv_mib=14, context=widget.budget['context'])"))
    assert float(kernel(nb, "widget.trace.keep.mean()")) == pytest.approx(want, abs=0.011)
    said = nb.page.locator(".mod-figures").first.inner_text()
    assert "against the dense model" in said and "against everything kept" in said
    nb.page.screenshot(path=shots / "quickstart-own-text.png")


def test_the_dark_theme(nb: Notebook, shots: Path) -> None:
    nb.theme("JupyterLab Dark")
    nb.page.wait_for_selector("canvas[data-theme=dark]")
    nb.page.wait_for_function(BRIGHT_LABELS)
    nb.screenshot(shots / "quickstart-dark")
    nb.theme("JupyterLab Light")


def test_the_committed_notebook_shows_pictures_without_a_kernel(lab: JupyterLab, shots: Path) -> None:
    assert QUICKSTART.stat().st_size < 1_000_000
    saved = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    assert "widgets" not in saved["metadata"]
    cells = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "run scripts/make_notebooks.py"
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    with lab.open(QUICKSTART, timeout=60, keep_outputs=True) as nb:
        picture = nb.page.locator(".jp-OutputArea img").first
        picture.wait_for()
        size = picture.evaluate("e => [e.naturalWidth, e.naturalHeight, e.complete]")
        assert size[0] >= 900 and size[1] >= 300 and size[2]
        assert not re.search("|".join(BROKEN_WIDGET_TEXT), nb.text())
        nb.screenshot(shots / "quickstart-not-run")
