"""Flipped cells, thresholds by layer, generations side by side, the frontier; in a real JupyterLab."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.helpers import MODEL, answered, kernel, settled, until
from tests.browser.notebook_browser import JupyterLab, Notebook

pytestmark = pytest.mark.browser

SETUP = f"""\
{MODEL}from modlab.widgets import CellFlip, Compare, Frontier, Thresholds
text = "def run(x1):\\n    return the router decides which token runs and which token skips, 日本 🙂\\n" * 2
flip = CellFlip(model, tokenizer, text)
flip"""
THRESHOLDS = "thresholds = Thresholds(model, tokenizer, text)\nthresholds"
COMPARE = (
    "compare = Compare(model, tokenizer, 'the router decides', p=(0.3, 0.7), max_new_tokens=20)\ncompare"
)
FRONTIER = """\
sweep = modlab.sweep(model, tokenizer, [text], thresholds=[0.3, 0.4, 0.45, 0.5, 0.55], repeats=1,
                     prompt_tokens=64, decode_tokens=4, progress=False)
dense = {"kv_bytes": float(sweep.dense_kv_bytes[0]), "loss": float(sweep.loss.min())}
from modlab import published
frontier = Frontier(sweep, model, {"dense": dense}, real=published.real_models(),
                    real_times=published.kv_latencies())
frontier"""
CLASSES = "classes = modlab.aggregate_routing(model, tokenizer, [text], progress=False).widget()\nclasses"


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, notebook: Callable[..., Path]) -> Iterator[Notebook]:
    with lab.open(
        notebook(SETUP, THRESHOLDS, COMPARE, FRONTIER, CLASSES, name="steering"), timeout=180
    ) as nb:
        nb.run_all()
        yield nb
        nb.check()


def view(nb: Notebook, name: str) -> Any:
    return nb.page.locator(f".modlab[data-view={name}]")


def says(nb: Notebook, css: str, text: str) -> None:
    """Until an element says this somewhere."""
    nb.page.wait_for_function(
        "([css, text]) => document.querySelector(css).innerText.includes(text)", arg=[css, text]
    )


def test_a_click_flips_a_cell(nb: Notebook) -> None:
    box = view(nb, "flip")
    canvas = box.locator("canvas.modlab-heatmap")
    canvas.scroll_into_view_if_needed()
    before = {name: box.locator(f".modlab-flip-{name}").inner_text() for name in ("loss", "kv")}
    at = {"x": 58 + 30 * canvas_width(nb), "y": 4 + 22 * 1.5}
    with answered(nb, "flip"):
        canvas.click(position=at)
    (cell,) = eval(kernel(nb, "flip.flips"))
    layer, token, keep = cell
    assert layer == 1
    assert kernel(nb, f"bool(flip.trace.keep[0, {token}])") == str(keep)
    assert box.locator(".modlab-flip-loss").inner_text() == kernel(nb, "f\"{flip.effect['loss']:.4f}\"")
    assert box.locator(".modlab-flip-loss").inner_text() != before["loss"]
    assert "layer 1" in box.locator(".modlab-flips").inner_text()
    assert "keeps" not in box.locator(".modlab-error").inner_text()
    rows = box.locator(".modlab-next tbody tr")
    assert rows.count() == 8
    assert f"token {token}" in box.locator(".modlab-next h3").inner_text()  # what may follow the flipped one
    assert int(kernel(nb, "flip.effect['at']")) == token
    with answered(nb, "flip"):
        box.locator(".modlab-flips button").first.click()
    assert kernel(nb, "flip.flips") == "[]"
    assert box.locator(".modlab-flip-loss").inner_text() == before["loss"]
    assert box.locator(".modlab-flip-kv").inner_text() == before["kv"]


def canvas_width(nb: Notebook) -> float:
    """Width of a token in the flip view, CSS pixels."""
    return nb.page.evaluate(
        """() => { const c = document.querySelector('[data-view=flip] canvas.modlab-heatmap');
             const T = document.querySelectorAll('[data-view=flip] .mod-token[data-t]').length;
             return Math.min(26, Math.max(7, (c.clientWidth - 108) / T)); }"""
    )


def test_the_keyboard_flips_too(nb: Notebook) -> None:
    canvas = view(nb, "flip").locator("canvas.modlab-heatmap")
    canvas.focus()
    with answered(nb, "flip"):
        for key in ("Home", *5 * ["ArrowRight"], "ArrowDown", "Enter"):
            canvas.press(key)
    assert kernel(nb, "[f[:2] for f in flip.flips]") == "[[1, 5]]"
    canvas.press("ArrowUp")
    canvas.press("Enter")  # a dense layer cannot be flipped, and says so
    nb.wait_idle()
    assert "Layer 0 is dense" in view(nb, "flip").locator(".modlab-how").inner_text()
    assert kernel(nb, "[f[:2] for f in flip.flips]") == "[[1, 5]]"
    nb.python("flip.reset(); flip.wait()")


def test_a_locked_token_chooses_what_is_predicted(nb: Notebook) -> None:
    box = view(nb, "flip")
    with answered(nb, "flip"):
        box.locator(".modlab-text .mod-token").nth(12).click()
    assert (
        "token 12" in box.locator(".modlab-next h3").inner_text() and kernel(nb, "flip.effect['at']") == "12"
    )
    with answered(nb, "flip"):
        box.locator(".modlab-text").press("Escape")
    assert kernel(nb, "flip.effect['at'] == len(flip.tokens) - 1") == "True"


def test_a_layers_slider_previews_then_measures(nb: Notebook) -> None:
    box = view(nb, "thresholds")
    kept = box.locator(".mod-layer-kept").nth(1)
    before, runs = kept.inner_text(), kernel(nb, "thresholds.summary['run']")
    p = nb.drag("[data-view=thresholds] .mod-layer-slider:nth-child(2) input", 0.7, release=False)
    says(nb, "[data-view=thresholds] .modlab-badge", "preview")
    nb.page.wait_for_timeout(400)  # longer than the page waits before it asks
    assert box.locator(".modlab-badge").inner_text() == "preview" and kept.inner_text() != before
    want = float(kernel(nb, f"thresholds.trace.preview_keep([0.5, {p}, 0.5])[1].mean()"))
    shown = float(kept.inner_text().split()[1])
    assert shown == pytest.approx(100 * want, abs=0.51) and kernel(nb, "thresholds.summary['run']") == runs
    with answered(nb, "thresholds"):
        nb.page.mouse.up()
    assert box.locator(".modlab-badge").inner_text() == "measured"
    assert kernel(nb, "thresholds.thresholds") == f"{{1: 0.5, 3: {p}, 5: 0.5}}"


def test_layer_sliders_fit_and_their_words_are_whole(nb: Notebook) -> None:
    size = nb.page.viewport_size
    nb.page.set_viewport_size({"width": 1280, "height": 800})
    nb.python("before = thresholds.thresholds; thresholds.apply(0.01)")  # "keeps 100 %", the longest
    nb.wait_idle()
    cut = """() => [...document.querySelectorAll('.mod-layer-sliders, .mod-layer-slider *')]
      .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.className)"""
    assert nb.page.evaluate(cut) == []
    assert "keeps 100 %" in view(nb, "thresholds").locator(".mod-layer-kept").first.inner_text()
    nb.python("thresholds.apply(before)")
    nb.page.set_viewport_size(size)
    nb.wait_idle()


def test_the_global_slider_moves_all(nb: Notebook) -> None:
    with answered(nb, "thresholds"):
        p = nb.drag("[data-view=thresholds] .modlab-threshold", 0.4)
    assert kernel(nb, "set(model.mod.thresholds.values())") == f"{{{p}}}"


def test_calibrate_buttons(nb: Notebook) -> None:
    box = view(nb, "thresholds")
    box.locator(".modlab-want-ratio").fill("30")
    box.locator(".modlab-calibrate-ratio").click()
    settled(nb, "thresholds")
    assert float(kernel(nb, "thresholds.trace.keep.mean()")) == pytest.approx(0.3, abs=0.02)
    box.locator(".modlab-want-mib").fill("0.000001")
    box.locator(".modlab-calibrate-kv").click()
    nb.page.wait_for_function(
        "() => /takes between/.test(document.querySelector('[data-view=thresholds] .modlab-error').innerText)"
    )
    nb.wait_idle()
    length = int(kernel(nb, "len(thresholds.tokens)"))
    dense = float(kernel(nb, "thresholds.summary['dense_bytes']"))
    box.locator(".modlab-want-mib").fill(str(0.75 * dense / 2**20))
    box.locator(".modlab-want-context").fill(str(length))
    box.locator(".modlab-calibrate-kv").click()
    settled(nb, "thresholds")
    assert float(kernel(nb, "thresholds.summary['kv_bytes']")) == pytest.approx(0.75 * dense, rel=0.03)
    assert not box.locator(".modlab-error").is_visible()


def test_a_long_run_shows_its_progress_and_stops(nb: Notebook) -> None:
    nb.python(
        "import time\n"
        "slow = lambda *_: time.sleep(0.25)\n"
        "hooks = [layer.register_forward_pre_hook(slow) for layer in model.get_decoder().layers]\n"
        "before = thresholds.thresholds"
    )
    box = view(nb, "thresholds")
    box.locator(".modlab-calibrate-ratio").click()
    nb.page.wait_for_function(
        "() => /layer [2-6] of 6/.test("
        "document.querySelector('[data-view=thresholds] .mod-job-text').innerText)"
    )
    assert float(box.locator("progress").get_attribute("value") or 0) > 0
    box.get_by_role("button", name="stop this computation").click()
    nb.page.wait_for_function(
        "() => document.querySelector('[data-view=thresholds] .modlab-job').dataset.state === 'cancelled'"
    )
    nb.python("[h.remove() for h in hooks]")
    assert kernel(nb, "thresholds.thresholds == before") == "True"
    assert "Stopped" in box.locator(".mod-job-text").inner_text()


def test_compare_generates_both_sides(nb: Notebook) -> None:
    box = view(nb, "compare")
    box.locator(".modlab-prompt").fill("which token runs\n  and")
    nb.drag("[data-view=compare] .mod-column:nth-child(2) .modlab-side-p", 0.9)
    box.locator(".modlab-generate").click()
    nb.page.wait_for_function(
        "() => document.querySelectorAll('[data-view=compare] .mod-column .mod-note')[1]"
        ".innerText.includes('20 tokens')"
    )
    settled(nb, "compare")
    sides = eval(kernel(nb, "[(r['p'], r['prompt'], r['text']) for r in compare.result]"))
    assert sides[0][:2] == (0.3, "which token runs\n  and") and sides[1][0] == pytest.approx(0.9, abs=0.02)
    for i in (0, 1):
        shown = box.locator(".modlab-side-text").nth(i).evaluate("e => e.textContent")
        assert shown == sides[i][1] + sides[i][2]
    marked = box.locator(".modlab-side-text").first.locator("mark").count()
    assert marked == int(kernel(nb, "sum(not s for s in compare.sides[0]['same'])"))
    assert kernel(nb, "set(model.mod.thresholds.values()) == set(thresholds.thresholds.values())") == "True"


def test_the_frontiers_point_is_dragged(nb: Notebook) -> None:
    box = view(nb, "frontier")
    box.scroll_into_view_if_needed()
    assert box.locator("svg.modlab-frontier").count() == 2  # memory and time, one next to the other
    handle = box.locator(".mod-handle").first
    a, b = handle.bounding_box(), box.locator("circle.mod-dot").nth(4).bounding_box()
    before = kernel(nb, "model.mod.thresholds[1]")
    nb.page.mouse.move(a["x"] + 9, a["y"] + 9)
    nb.page.mouse.down()
    nb.page.mouse.move(b["x"] + 4, b["y"] + 4, steps=12)
    says(nb, ".modlab-frontier-says", "p 0.55:")
    nb.page.wait_for_timeout(400)  # longer than the page waits before it asks
    assert kernel(nb, "model.mod.thresholds[1]") == before  # not before it is released
    with answered(nb, "frontier"):
        nb.page.mouse.up()
    assert kernel(nb, "set(model.mod.thresholds.values()), frontier.applied") == "{0.55} 0.55"
    assert box.locator(".modlab-badge").inner_text() == "set in the model"
    handle.focus()
    handle.press("ArrowLeft")
    handle.press("ArrowLeft")
    until(nb, "abs(model.mod.thresholds[1] - 0.53) < 1e-6")  # in one request or two
    settled(nb, "frontier")
    box.locator(".modlab-frontier-time").select_option("prefill_ms")
    nb.page.wait_for_function(
        "() => document.querySelector('.modlab-frontier-says').innerText.includes('first token')"
    )


def test_the_point_of_a_real_model_moves_on_both_curves(nb: Notebook) -> None:
    box = view(nb, "frontier")
    box.scroll_into_view_if_needed()
    p = kernel(nb, "model.mod.thresholds[1]")
    box.locator(".modlab-frontier-from").select_option(label="coder-0.5b")
    nb.page.wait_for_function(
        "() => document.querySelector('.modlab-frontier-says').innerText.includes('KL to the dense model')"
    )
    assert "NVIDIA H200" in box.locator(".modlab-frontier-note").inner_text()
    memory, time = box.locator(".mod-handle").first, box.locator(".mod-handle").nth(1)
    before, after = time.bounding_box(), box.locator("svg").first.locator("circle.mod-dot").nth(3)
    a, b = memory.bounding_box(), after.bounding_box()
    nb.page.mouse.move(a["x"] + 9, a["y"] + 9)
    nb.page.mouse.down()
    nb.page.mouse.move(b["x"] + 4, b["y"] + 4, steps=12)
    nb.page.mouse.up()
    says(nb, ".modlab-frontier-says", "16x: ")
    says(nb, ".modlab-frontier-says", "15.99x smaller")
    assert box.locator(".modlab-frontier-says").inner_text().startswith("16x: ")
    assert time.bounding_box()["y"] != before["y"]
    box.locator(".modlab-frontier-quality").select_option("lost_7000")
    nb.page.wait_for_function(
        "() => document.querySelector('.modlab-frontier-says').innerText.includes('answers lost, 7,000')"
    )
    memory.focus()
    memory.press("PageDown")
    until(nb, "frontier.saving == frontier.lines[1]['points'][2]['at'] and frontier.line == 1")
    assert kernel(nb, "model.mod.thresholds[1]") == p  # nothing of it is about the model here
    box.locator(".modlab-frontier-from").select_option(label="this machine")
    nb.wait_idle()


def test_new_lines_of_the_same_names_are_drawn(nb: Notebook) -> None:
    """Also where nothing but the values of the points differs."""
    box = view(nb, "frontier")
    box.scroll_into_view_if_needed()
    box.locator(".modlab-frontier-from").select_option(label="this machine")
    nb.wait_idle()
    lines = "[...document.querySelectorAll('svg.modlab-frontier polyline')]"
    pictures = f"() => {lines}.map(e => e.getAttribute('points'))"
    before = nb.page.evaluate(pictures)
    nb.python(
        "import copy\n"
        "lines = copy.deepcopy(frontier.lines)\n"
        "for at, point in enumerate(lines[0]['points']): point['loss'] += at**2\n"
        "before, frontier.lines = frontier.lines, lines"
    )
    nb.page.wait_for_function(f"before => ({pictures})().every((now, i) => now !== before[i])", arg=before)
    nb.python("frontier.lines = before")
    nb.page.wait_for_function(f"before => ({pictures})().every((now, i) => now === before[i])", arg=before)


def test_classes_are_a_readable_table(nb: Notebook) -> None:
    table = view(nb, "classes").locator("table").first
    names = table.locator("tbody th").all_inner_texts()
    assert {"identifier", "keyword", "punctuation", "newline"} <= set(names)
    frame_row = kernel(nb, "[round(100 * x) for x in classes.classes[0]['kept']]")
    cells = [int(x) for x in table.locator("tbody tr").first.locator(".mod-cell").all_inner_texts()]
    assert str(cells[:3]) == frame_row
    table.locator(".mod-cell").first.hover()
    assert "layer 1 keeps" in view(nb, "classes").locator(".modlab-classes-says").inner_text()


def test_screenshots(nb: Notebook, shots: Path) -> None:
    nb.python("flip.flip(1, 20); flip.flip(3, 30); flip.wait()")
    nb.wait_idle()
    nb.screenshot(shots / "steering")
    try:
        nb.theme("JupyterLab Dark")
        nb.page.wait_for_selector("canvas[data-theme=dark]")
        nb.wait_idle()
        nb.screenshot(shots / "steering-dark")
    finally:
        nb.theme("JupyterLab Light")
