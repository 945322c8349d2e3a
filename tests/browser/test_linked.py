"""One marked token in all views of a text, in whatever cell they are; in a real JupyterLab."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.helpers import MODEL, kernel
from tests.browser.notebook_browser import JupyterLab, Notebook

pytestmark = pytest.mark.browser

CELLS = (
    f"{MODEL}from modlab.widgets import RoutingHeatmap, TokenPath, TokenText\n"
    "trace = make_trace(120)\n"
    "heatmap, words, path = RoutingHeatmap(trace), TokenText(make_trace(120, seed=3)), TokenPath(trace)\n"
    "heatmap",
    "words",
    "path",
    "other = TokenText(make_trace(40, tokens=[f'x{i} ' for i in range(40)]))\nother",
)


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, notebook: Callable[..., Path]) -> Iterator[Notebook]:
    with lab.open(notebook(*CELLS, name="linked"), timeout=120) as nb:
        nb.run_all()
        yield nb
        nb.check()


def view(nb: Notebook, name: str, index: int = 0):
    return nb.page.locator(f".modlab[data-view={name}]").nth(index)


def test_hover_marks_the_token_in_other_cells(nb: Notebook) -> None:
    words, heatmap, path = view(nb, "text"), view(nb, "heatmap"), view(nb, "path")
    blank = nb.pixels("canvas.modlab-heatmap")
    words.locator("[data-t='17']").hover()
    nb.page.wait_for_selector(".mod-path[data-token='17']")
    assert "token 17" in path.locator(".modlab-path-says").inner_text()
    assert nb.pixels("canvas.modlab-heatmap") != blank
    assert view(nb, "text", 1).locator(".mod-on").count() == 0  # another text
    heatmap.locator("canvas.modlab-heatmap").hover(position={"x": 58 + 300, "y": 4 + 22 * 1.5})
    nb.page.wait_for_function("() => document.querySelector('.mod-path').dataset.token > 17")
    token = path.locator(".mod-path").get_attribute("data-token")
    assert words.locator(".mod-on").get_attribute("data-t") == token
    assert kernel(nb, "path.cursor, heatmap.cursor") == "-1 -1"  # passing over tells Python nothing


def test_a_click_locks_it_everywhere_and_tells_python(nb: Notebook) -> None:
    words = view(nb, "text")
    words.locator("[data-t='23']").click()
    view(nb, "text", 1).locator("[data-t='2']").hover()
    nb.wait_idle()
    assert view(nb, "path").locator(".mod-path").get_attribute("data-token") == "23"
    assert words.locator(".mod-locked").get_attribute("data-t") == "23"
    assert kernel(nb, "[w.cursor for w in (heatmap, words, path)], path.locked") == "[23, 23, 23] True"


def test_keys_move_a_locked_token_and_escape_frees_it_everywhere(nb: Notebook) -> None:
    plot = view(nb, "path").locator(".mod-path-plot")
    plot.focus()
    plot.press("ArrowRight")
    plot.press("ArrowRight")
    nb.page.wait_for_selector(".mod-path[data-token='25']")
    assert view(nb, "text").locator(".mod-on").get_attribute("data-t") == "25"
    plot.press("Escape")
    nb.page.wait_for_selector(".mod-path[data-token='-1']")
    nb.wait_idle()
    assert view(nb, "text").locator(".mod-on").count() == 0
    assert kernel(nb, "[w.cursor for w in (heatmap, words, path)], path.locked") == "[-1, -1, -1] False"


def test_python_marks_a_token(nb: Notebook) -> None:
    nb.python("heatmap.cursor = 40; heatmap.locked = True")
    nb.page.wait_for_selector(".mod-path[data-token='40']")
    assert view(nb, "text").locator(".mod-locked").get_attribute("data-t") == "40"
    nb.wait_idle()
    assert kernel(nb, "words.cursor") == "40"
    nb.page.locator(".mod-path-plot").press("Escape")
    nb.wait_idle()


def test_the_path_says_what_the_trace_says(nb: Notebook) -> None:
    view(nb, "path").get_by_role("button", name="the next token").click()
    nb.page.wait_for_function("() => document.querySelector('.mod-path').dataset.token >= 0")
    token = int(view(nb, "path").locator(".mod-path").get_attribute("data-token"))
    ran = int(kernel(nb, f"3 + trace.keep[:, {token}].sum()"))
    says = view(nb, "path").locator(".modlab-path-says").inner_text()
    assert f"ran {ran} of 6 layers and left keys and values in {ran} of them" in says
    hollow = view(nb, "path").locator(".mod-station rect[stroke-dasharray]").count()
    assert hollow == 6 - ran
    nb.page.locator(".mod-path-plot").press("Escape")


def test_screenshots(nb: Notebook, shots: Path) -> None:
    view(nb, "text").locator("[data-t='30']").click()
    nb.screenshot(shots / "linked")
    try:
        nb.theme("JupyterLab Dark")
        nb.page.wait_for_selector("canvas[data-theme=dark]")
        nb.screenshot(shots / "linked-dark")
    finally:
        nb.theme("JupyterLab Light")
