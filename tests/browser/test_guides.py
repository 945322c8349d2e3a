"""The guided notebooks in a real JupyterLab: opened, run, dragged and clicked, in both themes."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.browser.conftest import ROOT
from tests.browser.helpers import answered, wait_preview
from tests.browser.notebook_browser import JupyterLab, Notebook
from tests.helpers.notebook_promises import PROMISES

pytestmark = pytest.mark.browser  # the long ones: .ci/versions notebooks

Open = Callable[[str], AbstractContextManager[Notebook]]


@pytest.fixture
def guide(lab: JupyterLab, tmp_path: Path, shots: Path) -> Open:
    """Opens a notebook by name and runs it; afterwards: nothing broke, and how it looks in both themes."""

    @contextmanager
    def run(name: str) -> Iterator[Notebook]:
        # The kernel works in an empty folder: notebooks write files next to themselves.
        with lab.open(ROOT / "notebooks" / f"{name}.ipynb", timeout=300, cwd=tmp_path) as nb:
            nb.run_all()
            nb.screenshot(shots / name)
            said = nb.text().replace("\t", " ")  # between the cells of a table
            for promise in PROMISES[name]:
                assert re.search(promise, said), f"{promise} in\n{said}"
            yield nb
            nb.check()
            try:  # the theme is the server's: the next notebook would open in it
                nb.theme("JupyterLab Dark")
                nb.screenshot(shots / f"{name}-dark")
                nb.check()
            finally:
                nb.theme("JupyterLab Light")

    return run


def view(name: str) -> str:
    return f".modlab[data-view={name}]"


def wait_for(nb: Notebook, name: str, css: str, text: str) -> None:
    """Until an element of a view says something that matches."""
    nb.page.wait_for_function(
        "([css, text]) => new RegExp(text).test(document.querySelector(css).textContent)",
        arg=[f"{view(name)} {css}", text],
        timeout=90_000,
    )


def test_convert(guide: Open) -> None:
    with guide("1_convert") as nb:
        said = nb.text()
        assert "weights untouched: True" in said and "same logits: True" in said
        nb.expect(".js-plotly-plot", count=2)
        # The heatmap answers to the mouse: plotly shows the token and its change.
        plot = nb.page.locator(".js-plotly-plot").first
        plot.scroll_into_view_if_needed()
        plot.hover(position={"x": 400, "y": 200})
        label = nb.page.locator(".js-plotly-plot .hoverlayer .hovertext").first
        label.wait_for()
        assert "nats" in (label.text_content() or "")


@pytest.mark.long
def test_train(guide: Open) -> None:
    with guide("2_train") as nb:
        nb.expect(f"{view('training')} svg.modlab-curve", count=2)
        panel = nb.page.locator(view("training")).first
        assert panel.locator(".modlab-badge").inner_text() == "finished"
        assert "weights are equal: True" in nb.text()
        nb.expect("canvas.modlab-heatmap", count=2)
        # Another run with the panel's button, stopped with its other one.
        steps = nb.python("print(panel.result.steps)").strip()
        panel.locator(".modlab-start").click()
        panel.locator(".modlab-stop").wait_for()
        wait_for(nb, "training", ".modlab-how", "^Step")
        panel.locator(".modlab-stop").click()
        wait_for(nb, "training", ".modlab-badge", "^stopped$")
        nb.wait_idle()
        assert 0 < int(nb.python("print(panel.result.steps)")) < int(steps)


@pytest.mark.long
def test_where_tokens_go(guide: Open) -> None:
    with guide("3_where_tokens_go") as nb:
        for name in ("explorer", "classes", "flip"):
            nb.expect(view(name))
        nb.expect(".js-plotly-plot")
        # A token under the mouse in the explorer's text is marked in the view of the other cell, too.
        flip = nb.page.locator(view("flip")).first
        before = flip.locator("canvas.modlab-heatmap").first.screenshot()
        token = nb.page.locator(f"{view('explorer')} .mod-token").nth(30)
        token.click()
        nb.wait_idle()
        assert nb.python("print(flip.cursor)").strip() == token.get_attribute("data-t")
        assert flip.locator("canvas.modlab-heatmap").first.screenshot() != before
        nb.page.locator(f"{view('explorer')} .modlab-text").press("Escape")
        # A click on a cell runs the model with that decision turned round.
        assert nb.python("print(len(flip.flips))").strip() == "0"
        canvas = flip.locator("canvas.modlab-heatmap").first
        canvas.scroll_into_view_if_needed()
        with answered(nb, "flip"):
            canvas.click(position={"x": 300, "y": 4 + 22 * 1.5})  # layer 1
        assert nb.python("print(len(flip.flips))").strip() == "1"
        assert nb.python("print(flip.effect['loss'] != flip.effect['loss_before'])").strip() == "True"
        # A text that is put into the explorer is run by the view that is linked to it.
        nb.page.locator(f"{view('explorer')} .modlab-own-text").click()
        nb.page.locator(f"{view('explorer')} .modlab-own-area").fill("x = 1\ny = 2\nprint(x + y)\n")
        nb.page.locator(f"{view('explorer')} .modlab-run-text").click()
        wait_for(nb, "flip", ".modlab-text", r"^x = 1\ny = 2\nprint\(x \+ y\)\n$")
        nb.python("explorer.wait(); flip.wait()")
        assert nb.python("print(flip.flips, flip.group == explorer.group)").strip() == "[] True"


@pytest.mark.long
def test_thresholds(guide: Open) -> None:
    with guide("4_thresholds") as nb:
        nb.expect(view("thresholds"))
        nb.expect(view("compare"))
        heatmap = nb.pixels("canvas.modlab-heatmap")
        p = nb.drag(f"{view('thresholds')} .modlab-threshold", 0.7, release=False)
        wait_preview(nb)
        with answered(nb, "sliders"):
            nb.page.mouse.up()
        wait_for(nb, "thresholds", ".modlab-badge", "^measured$")
        assert set(map(float, nb.python("print(*sliders.thresholds.values())").split())) == {p}
        assert nb.pixels("canvas.modlab-heatmap") != heatmap
        # The button that finds a threshold for a share of tokens.
        nb.page.locator(f"{view('thresholds')} .modlab-want-ratio").fill("40")
        with answered(nb, "sliders"):
            nb.page.locator(f"{view('thresholds')} .modlab-calibrate-ratio").click()
        kept = float(nb.python("print(measure.evaluate(model, SAMPLE, tokenizer).keep_ratio)"))
        assert kept == pytest.approx(0.40, abs=0.011)


@pytest.mark.long
def test_what_it_buys(guide: Open, shots: Path) -> None:
    with guide("5_what_it_buys") as nb:
        nb.expect(".js-plotly-plot", count=2)
        nb.expect(f"{view('frontier')} svg.modlab-frontier")
        handle = nb.page.locator(f"{view('frontier')} .mod-handle").first
        handle.scroll_into_view_if_needed()
        before = nb.page.locator(".modlab-frontier-says").inner_text()
        box = handle.bounding_box()
        assert box
        nb.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        nb.page.mouse.down()
        nb.page.mouse.move(box["x"] + 160, box["y"], steps=8)
        nb.page.mouse.up()
        wait_for(nb, "frontier", ".modlab-badge", "^set in the model$")
        nb.wait_idle()
        p = float(nb.python("print(frontier.threshold)"))
        assert p != 0.5 and nb.page.locator(".modlab-frontier-says").inner_text() != before
        assert float(nb.python("print(model.mod.thresholds[1])")) == p
        # The same curve against what an H200 took, from the committed results.
        nb.page.locator(f"{view('frontier')} .modlab-frontier-time").select_option(
            label="H200, 8B shape: one token after 32,768"
        )
        wait_for(
            nb,
            "frontier",
            ".modlab-frontier-note",
            "on NVIDIA H200, 2026-.*at the keep ratio that this model",
        )
        wait_for(nb, "frontier", ".modlab-frontier-says", "against dense, trained as long: 1\\.")
        nb.expect(f"{view('frontier')} svg.modlab-frontier .mod-reference")
        nb.page.locator(view("frontier")).screenshot(path=shots / "frontier-h200.png")


@pytest.mark.long
def test_many_gpus(guide: Open) -> None:
    with guide("6_many_gpus") as nb:
        assert "all 2 processes end with the same weights: True" in nb.text()
        nb.expect(".js-plotly-plot")


def test_your_own_experiment(guide: Open) -> None:
    with guide("7_your_own_experiment") as nb:
        nb.expect(".gate-bars")
        bars = nb.page.locator(".gate-bars")
        before = bars.inner_text()
        token = nb.page.locator(f"{view('text')} .mod-token").nth(12)
        token.hover()
        nb.wait_idle()
        assert bars.inner_text() != before, "the widget follows the mouse in modlab's own view"
        at = int(token.get_attribute("data-t") or -1)
        assert nb.python("print(my_bars.cursor)").strip() == str(at)
        want = nb.python(f"print(*[f'{{g:.2f}}' for g in mine.gate[:, {at}].tolist()])").split()
        assert len(want) == 6 and all(value in bars.inner_text() for value in want)
