"""The explorer and the single views in a real JupyterLab, on a tiny model."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.helpers import (
    BRIGHT_LABELS,
    CONTRASTS,
    MODEL,
    kernel,
    read,
    until,
    wait_measured,
    wait_preview,
)
from tests.browser.notebook_browser import JupyterLab, Notebook

pytestmark = pytest.mark.browser

SETUP = f"""\
{MODEL}text = "the router decides which token runs and which token skips, 日本 🙂\\n" * 4
from tests.helpers.models import dense_llama
other = routed_llama(skip="kv")
explorer = modlab.widgets.explore(model, tokenizer, text, dense=dense_llama(), others=[other])
explorer"""
SINGLE = """\
from modlab.widgets import RoutingHeatmap, TokenText, link
trace = make_trace(90)
heatmap, words = RoutingHeatmap(trace), TokenText(trace)
links = link(heatmap, words)
heatmap"""
CURVE = """\
import pandas as pd
sweep = pd.DataFrame({"threshold": [0.2, 0.5, 0.8], "kv_bytes": [9e5, 7e5, 6e5], "loss": [2.0, 2.1, 2.6]})
modlab.widgets.ThresholdCurve(sweep, p=0.6)"""


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, notebook: Callable[..., Path]) -> Iterator[Notebook]:
    with lab.open(notebook(SETUP, SINGLE, "words", CURVE, name="explorer"), timeout=120) as nb:
        nb.run_all()
        yield nb
        if not nb.ignore_console:  # else the last test has checked it, and taken the kernel away
            nb.check()  # nothing that the tests did may have left an error behind


def test_everything_is_on_the_screen(nb: Notebook, shots: Path) -> None:
    for css in (".modlab-threshold", "canvas.modlab-heatmap", ".modlab-text .mod-token", ".modlab-badge"):
        nb.expect(css)
    nb.expect("canvas.modlab-heatmap", count=2)
    nb.expect("svg.modlab-curve", count=2)
    nb.screenshot(shots / "explorer")


def test_slider_figures_heatmap_and_curves_share_a_screen(nb: Notebook) -> None:
    size = nb.page.viewport_size
    nb.page.set_viewport_size({"width": 1280, "height": 800})
    nb.wait_idle()
    box = nb.page.locator(".modlab[data-view=explorer]")
    box.evaluate("e => e.scrollIntoView()")
    seen = nb.page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').clientHeight")
    row = box.locator(".mod-row").first.bounding_box()
    above = row["y"] + row["height"] - box.bounding_box()["y"]
    assert above < seen - 40 < 660 and box.bounding_box()["height"] < 900
    nb.page.set_viewport_size(size)
    nb.wait_idle()


def test_a_drag_previews_and_a_release_measures(nb: Notebook) -> None:
    heatmap = nb.page.locator("canvas.modlab-heatmap").first
    before = {what: read(nb, what) for what in ("kept", "kv", "loss")}
    picture, runs = nb.pixels("canvas.modlab-heatmap"), kernel(nb, "explorer.summary['run']")
    p = nb.drag(".modlab-threshold", 0.62, release=False)
    wait_preview(nb)
    nb.page.wait_for_timeout(600)
    # Dragged, not released: the browser alone draws, the kernel has heard nothing.
    assert heatmap.get_attribute("data-state") == "preview" and read(nb, "badge") == "preview"
    want = float(kernel(nb, f"explorer.trace.preview_keep({p}).mean()"))
    assert float(heatmap.get_attribute("data-kept") or 0) == pytest.approx(want, abs=6e-5)
    assert read(nb, "kept") != before["kept"] and read(nb, "kv").startswith("≈") and read(nb, "loss") == "–"
    assert kernel(nb, "explorer.summary['run']") == runs and kernel(nb, "model.mod.thresholds[1]") == "0.5"
    nb.page.mouse.up()
    wait_measured(nb, p)
    # Released: the page shows what the kernel measured.
    assert float(kernel(nb, "model.mod.thresholds[1]")) == p
    kept = float(kernel(nb, "explorer.trace.keep.mean()"))
    assert float(heatmap.get_attribute("data-kept") or 0) == pytest.approx(kept, abs=6e-5)
    assert read(nb, "loss") == kernel(nb, "f\"{explorer.summary['loss']:.3f}\"") != before["loss"]
    assert read(nb, "kv") != before["kv"] and "≈" not in read(nb, "kv")
    assert nb.pixels("canvas.modlab-heatmap") != picture
    assert nb.page.locator("svg.modlab-curve").count() == 4  # two runs now: the explorer's own curve is there
    nb.check()


def test_arrow_keys_on_the_slider_make_one_run(nb: Notebook) -> None:
    runs = int(kernel(nb, "explorer.summary['run']"))
    slider = nb.page.locator(".modlab-threshold").first
    slider.focus()
    for _ in range(6):
        slider.press("ArrowLeft")
    wait_measured(nb, round(float(slider.input_value()), 4))
    assert int(kernel(nb, "explorer.summary['run']")) == runs + 1


def test_python_moves_the_view(nb: Notebook) -> None:
    nb.python("explorer.run(0.45)")
    wait_measured(nb, 0.45)
    assert float(nb.page.locator(".modlab-threshold").first.input_value()) == pytest.approx(0.45)


def test_hover_links_heatmap_and_text(nb: Notebook) -> None:
    heatmap = nb.page.locator("canvas.modlab-heatmap").first
    heatmap.scroll_into_view_if_needed()
    heatmap.hover(position={"x": 58 + 200, "y": 4 + 22 * 1.5})
    on = nb.page.locator(".modlab").first.locator(".mod-on")
    on.wait_for()
    token = int(on.get_attribute("data-t") or -1)
    assert token > 5
    tip = nb.page.locator(".mod-tip").first.inner_text()
    assert f"token {token} of" in tip and "layer 1: gate" in tip
    gate = float(kernel(nb, f"explorer.trace.gate[0, {token}]"))
    assert f"gate {gate:.3f}" in tip or f"gate {gate - 0.0005:.3f}" in tip
    blank = nb.pixels("canvas.modlab-heatmap")
    nb.page.locator(".modlab-text").first.locator(".mod-token").nth(3).hover()
    nb.wait_idle()
    assert on.get_attribute("data-t") == "3" and nb.pixels("canvas.modlab-heatmap") != blank


def test_a_locked_token_reaches_python(nb: Notebook) -> None:
    token = nb.page.locator(".modlab-text").first.locator(".mod-token").nth(9)
    token.click()
    nb.wait_idle()
    assert kernel(nb, "explorer.cursor") == "9"
    nb.page.locator(".modlab-text").first.press("Escape")
    nb.wait_idle()
    assert kernel(nb, "explorer.cursor") == "-1"


def test_jupyterlab_does_not_take_the_keys(nb: Notebook) -> None:
    active = "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"
    heatmap = nb.page.locator("canvas.modlab-heatmap").first
    heatmap.click(position={"x": 20, "y": 10})
    before, cells = nb.page.evaluate(active), nb.page.locator(".jp-Cell").count()
    for key in ("ArrowDown", "ArrowLeft", "ArrowRight", "ArrowUp", "Enter", "Escape", "ArrowRight"):
        heatmap.press(key)
    nb.wait_idle()
    assert nb.page.evaluate(active) == before and nb.page.locator(".jp-Cell").count() == cells
    assert heatmap.evaluate("e => document.activeElement === e")


def test_linked_widgets_move_together(nb: Notebook) -> None:
    words, heatmap = nb.page.locator(".jp-Cell").nth(2), nb.page.locator("canvas.modlab-heatmap").nth(1)
    blank = nb.pixels("canvas.modlab-heatmap", 1)
    words.locator(".modlab-text .mod-token").nth(20).hover()
    nb.wait_idle()
    assert nb.pixels("canvas.modlab-heatmap", 1) != blank and kernel(nb, "heatmap.cursor") == "-1"
    nb.python("words.threshold = 0.8")
    nb.page.wait_for_function("c => c.dataset.threshold === '0.8'", arg=heatmap.element_handle())
    want = float(kernel(nb, "trace.preview_keep(0.8).mean()"))
    assert float(heatmap.get_attribute("data-kept") or 0) == pytest.approx(want, abs=6e-5)


def test_a_failed_run_is_shown_in_the_widget(nb: Notebook, shots: Path) -> None:
    nb.python(
        "good = model.forward\n"
        "def bad(*a, **k): raise RuntimeError('out of memory, say')\n"
        "model.forward = bad"
    )
    nb.drag(".modlab-threshold", 0.3)
    error = nb.page.locator(".modlab-error").first
    error.wait_for()
    nb.wait_idle()
    assert "RuntimeError: out of memory, say" in error.inner_text() and read(nb, "badge") == "preview"
    nb.page.screenshot(path=shots / "explorer-error.png")
    nb.python("model.forward = good")
    p = nb.drag(".modlab-threshold", 0.4)
    wait_measured(nb, p)
    assert not error.is_visible()


def test_the_dark_theme(nb: Notebook, shots: Path) -> None:
    nb.page.mouse.move(2, 2)
    nb.wait_idle()
    light = nb.pixels("canvas.modlab-heatmap")
    nb.theme("JupyterLab Dark")
    try:
        assert nb.pixels("canvas.modlab-heatmap") != light  # redrawn, not only its surroundings
        dark = nb.page.locator(".modlab").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert max(map(int, dark[4:-1].split(","))) < 60
        nb.page.wait_for_selector("canvas[data-theme=dark]")
        nb.page.wait_for_function(BRIGHT_LABELS)
        assert min(nb.page.evaluate(CONTRASTS)) >= 4.5
        nb.screenshot(shots / "explorer-dark")
    finally:
        nb.theme("JupyterLab Light")
    nb.page.wait_for_selector("canvas[data-theme=light]")
    nb.page.wait_for_function(f"() => !({BRIGHT_LABELS})()")
    assert min(nb.page.evaluate(CONTRASTS)) >= 4.5


OWN = "My grandmother kept bees behind the house, 日本 🙂, and I held the smoker."


def open_own_text(nb: Notebook) -> Any:
    """The explorer's text box."""
    nb.page.locator(".modlab-own-text").first.click()
    return nb.page.locator(".modlab-own-area").first


def wait_text(nb: Notebook, text: str) -> None:
    nb.page.wait_for_function(
        "text => document.querySelector('.modlab-text').textContent === text", arg=text, timeout=30_000
    )
    nb.python("explorer.wait()")
    nb.wait_idle()


def test_a_text_is_pasted_into_the_widget(nb: Notebook, shots: Path) -> None:
    cells, area = nb.page.locator(".jp-Cell").count(), open_own_text(nb)
    assert (
        area.input_value() == kernel(nb, "explorer.text") + "\n"
    )  # `kernel` strips the text's last line end
    assert area.evaluate("e => document.activeElement === e && e.selectionEnd === e.value.length")
    nb.page.keyboard.insert_text(OWN)  # as pasting does: it replaces what is selected
    nb.page.screenshot(path=shots / "explorer-own-text.png")
    area.press("Control+Enter")
    wait_text(nb, OWN)
    assert kernel(nb, "explorer.text") == OWN
    assert not nb.page.locator(".modlab-own-box").first.is_visible()
    assert nb.page.locator(".modlab-own-text").first.evaluate("e => document.activeElement === e")
    assert nb.page.locator(".jp-Cell").count() == cells  # JupyterLab did not take the keys
    # Every view of the explorer shows the new text.
    count = kernel(nb, "len(explorer.tokens)")
    assert f"{count} tokens" in nb.page.locator(".mod-about").first.inner_text()
    heatmap = nb.page.locator("canvas.modlab-heatmap").first
    kept = float(kernel(nb, "explorer.trace.keep.mean()"))
    assert float(heatmap.get_attribute("data-kept") or 0) == pytest.approx(kept, abs=6e-5)
    assert f"{count} tokens by 6 layers" in (heatmap.get_attribute("aria-label") or "")
    assert read(nb, "loss") == kernel(nb, "f\"{explorer.summary['loss']:.3f}\"")
    cost = float(kernel(nb, "explorer.summary['loss'] - explorer.summary['open_loss']"))
    said = nb.page.locator(".mod-figures .mod-more").nth(2).inner_text().replace("−", "-")
    told = f"{cost:+.3f}" if abs(cost) >= 0.0005 else "0.000"  # nothing has no sign
    assert f"{told} against everything kept" in said
    assert not re.search(r"[+-]0\.000", said)
    # What hangs on the slider hangs on the new text.
    wait_measured(nb, nb.drag(".modlab-threshold", 0.45))
    assert kernel(nb, "''.join(explorer.trace.tokens)") == OWN
    nb.check()


def test_a_file_is_opened(nb: Notebook, tmp_path: Path) -> None:
    file, picture = tmp_path / "mine.py", tmp_path / "mine.png"
    file.write_text("def add(a, b):\n    return a + b\n" * 3, encoding="utf-8")
    picture.write_bytes(b"\x89PNG\0\0")
    open_own_text(nb)
    box = nb.page.locator(".modlab-own-box").first
    box.locator(".modlab-own-file").set_input_files(picture)
    nb.page.wait_for_function(
        "() => document.querySelector('.modlab-own-box').innerText.includes('mine.png is not a text file')"
    )
    box.locator(".modlab-own-file").set_input_files(file)
    wait_text(nb, file.read_text(encoding="utf-8"))
    assert not box.is_visible()


def test_a_text_that_cannot_be_run_is_told(nb: Notebook) -> None:
    before = kernel(nb, "explorer.text")
    area, box = open_own_text(nb), nb.page.locator(".modlab-own-box").first
    area.fill("")
    box.locator(".modlab-run-text").click()
    assert "There is no text yet" in box.inner_text()
    nb.python(
        "good = model.forward\n"
        "def bad(*a, **k): raise RuntimeError('out of memory, say')\n"
        "model.forward = bad"
    )
    area.fill("some other text")
    box.locator(".modlab-run-text").click()
    error = nb.page.locator(".modlab-error").first
    error.wait_for()
    assert "This text could not be run" in error.inner_text() and "out of memory, say" in error.inner_text()
    assert (
        box.is_visible() and area.input_value() == "some other text" and kernel(nb, "explorer.text") == before
    )
    nb.python("model.forward = good")
    area.press("Escape")
    assert not box.is_visible()
    wait_measured(nb, nb.drag(".modlab-threshold", 0.5))
    assert not error.is_visible()


def test_a_long_text_is_cut_and_its_run_can_be_stopped(nb: Notebook) -> None:
    before = kernel(nb, "explorer.text")
    nb.python(
        "import time\n"
        "slow = lambda *_: time.sleep(0.4)\n"
        "hooks = [layer.register_forward_pre_hook(slow) for layer in model.get_decoder().layers]"
    )
    area, row = open_own_text(nb), nb.page.locator(".modlab-job").first
    area.fill("token " * 3000)
    area.press("Control+Enter")
    nb.page.wait_for_function(
        "() => /layer [2-6] of 6/.test(document.querySelector('.mod-job-text').innerText)"
    )
    row.get_by_role("button", name="stop this computation").click()
    nb.page.wait_for_function("() => document.querySelector('.modlab-job').dataset.state === 'cancelled'")
    nb.python("[hook.remove() for hook in hooks]")
    assert kernel(nb, "explorer.text") == before
    area.press("Control+Enter")
    nb.page.wait_for_selector(".modlab-text-note >> text=this model reads no more", timeout=60_000)
    nb.python("explorer.wait()")
    nb.wait_idle()
    assert int(kernel(nb, "len(explorer.tokens)")) <= 2048
    nb.python("explorer.set_text('short again'); explorer.wait()")
    nb.wait_idle()
    assert not nb.page.locator(".modlab-text-note").first.is_visible()


def test_the_curve_is_asked_for_and_drawn(nb: Notebook) -> None:
    nb.page.get_by_role("button", name="run the text at some ten thresholds").click()
    nb.page.wait_for_function(
        "() => document.querySelector('.mod-curve h3').innerText === 'What a threshold costs and buys'"
    )
    nb.python("explorer.wait()")
    nb.wait_idle()
    assert kernel(nb, "len(explorer.points)") == "10"
    nb.drag(".modlab-threshold", 0.62, release=False)
    nb.wait_idle()
    assert read(nb, "loss").startswith("≈ ")  # between two points of the curve
    nb.page.mouse.up()
    nb.page.wait_for_function("() => document.querySelector('.modlab-badge').dataset.state === 'measured'")
    nb.wait_idle()


def test_the_curve_has_far_recall_and_the_dense_model(nb: Notebook, shots: Path) -> None:
    nb.python("explorer.set_text(text * 6); explorer.wait(); explorer.measure_curve([0.5, 0.6, 0.8])")
    nb.wait_idle()
    curves = nb.page.locator(".mod-curve").first.locator("svg.modlab-curve")
    assert curves.count() == 3
    for key in ("loss", "recall"):
        curve = nb.page.locator(f"svg[data-curve={key}]").first
        assert curve.locator(".mod-reference-line").count() == 1 and "dense model" in curve.text_content()
        assert curve.locator(".mod-error-bar").count() == 3
    assert "against the dense model" in read(nb, "loss >> xpath=..")
    nb.screenshot(shots / "explorer-curve")


def test_points_beyond_the_training_of_the_routers_are_hollow(nb: Notebook, shots: Path) -> None:
    """Also where their threshold is known, and the slider says so."""
    curve = nb.page.locator(".mod-curve").first
    assert curve.locator(".mod-dot").count() == 9 and curve.locator(".mod-untrained").count() == 0
    nb.python(
        "from modlab.routing.trained import Trained\n"
        "model.mod.trained = Trained(savings={2.0: 0.5, 4.0: 0.6, 8.0: 0.8}, reached=4.0)\n"
        "explorer.run(0.8)"
    )
    nb.page.wait_for_function("() => document.querySelectorAll('.mod-curve .mod-untrained').length === 3")
    said = [dot.text_content() for dot in curve.locator(".mod-untrained").all()]
    assert all(one.startswith("p 0.8:") and one.endswith("beyond the training") for one in said)
    assert "Hollow points" in curve.locator(".modlab-untrained").inner_text()
    warning = nb.page.locator(".modlab-beyond").first.inner_text()
    assert warning.startswith("Threshold 0.8 lies beyond 0.6, that of 4x")
    nb.screenshot(shots / "explorer-untrained")
    nb.python("model.mod.trained = None; explorer.run(0.5)")
    nb.page.wait_for_function("() => !document.querySelector('.mod-curve .mod-untrained')")
    assert nb.page.locator(".modlab-beyond").first.is_hidden()
    assert curve.locator(".modlab-untrained").count() == 0


@pytest.mark.parametrize(
    "above, says",
    [
        (
            (0, 0.015, 0.3),
            r"x smaller \(p 0\.6\) at most 0\.015 nats worse, "
            r"clearly worse from [\d.]+x \(p 0\.8\) on, by 0\.300 nats there\.$",
        ),
        (
            (-0.02, 0.3, 0.015),
            r"up to [\d.]+x smaller \(p 0\.5\) no worse, "
            r"clearly worse at [\d.]+x \(p 0\.6\), by 0\.300 nats there\.$",
        ),
        ((0.3, -0.02, 0.3), r"Repeated passages: clearly worse at [\d.]+x \(p 0\.5\) already\.$"),
        ((-0.02, -0.02, -0.02), r"up to [\d.]+x smaller \(p 0\.8\) no worse, and no more was measured"),
        ((0.1, 0.2, 0.3), "clearly worse at every threshold here"),
    ],
)
def test_a_sentence_says_where_it_breaks(nb: Notebook, above: tuple[float, ...], says: str) -> None:
    """Beyond two standard errors, of 0.01 nats here."""
    nb.python(
        "base, before = explorer.summary['dense_recall'], explorer.points\n"
        f"above = dict(zip((0.5, 0.6, 0.8), {above}))\n"
        "explorer.points = [{**d, 'recall': base + above[d['p']], 'recall_stderr': 0.01} for d in before]"
    )
    nb.page.wait_for_function(
        "says => new RegExp(says).test(document.querySelector('.modlab-breaks').textContent)", arg=says
    )
    nb.python("explorer.points = before")


def test_a_point_that_saves_nothing_is_not_called_smaller(nb: Notebook) -> None:
    """Where even the first saving is worse the sentence begins with it, not with "up to 1.00x smaller"."""
    nb.python(
        "base, before = explorer.summary['dense_recall'], explorer.points\n"
        "above = {0.5: 0, 0.6: 0.3, 0.8: 0.3}\n"
        "all_of_it = explorer.summary['dense_bytes']\n"
        "explorer.points = [{**d, 'recall': base + above[d['p']], 'recall_stderr': 0.01,\n"
        "                    'kv_bytes': all_of_it if d['p'] == 0.5 else d['kv_bytes']} for d in before]"
    )
    says = (
        r"^Repeated passages: clearly worse from [\d.]+x \(p 0\.6\) on, by 0\.300 nats there\. "
        r"No smaller saving was measured\.$"
    )
    nb.page.wait_for_function(
        "says => new RegExp(says).test(document.querySelector('.modlab-breaks').textContent)", arg=says
    )
    nb.python("explorer.points = before")


def test_progress_shows_where_it_was_asked_for(nb: Notebook) -> None:
    nb.python(
        "import time\n"
        "slow = lambda *_: time.sleep(0.05)\n"
        "hooks = [layer.register_forward_pre_hook(slow) for layer in model.get_decoder().layers]\n"
        "explorer.set_text(text); explorer.wait(); explorer.points = []"
    )
    curve = nb.page.locator(".mod-curve").first
    curve.get_by_role("button", name="run the text at some ten thresholds").click()
    curve.locator(".modlab-job progress[value]").wait_for(timeout=60_000)
    assert "Measuring" in curve.locator(".mod-job-text").inner_text()
    curve.get_by_role("button", name="stop this computation").click()
    nb.page.wait_for_function("() => document.querySelector('.modlab-job').dataset.state === 'cancelled'")
    nb.python("[hook.remove() for hook in hooks]")
    nb.page.locator(".modlab-want-ratio").first.fill("200")
    nb.page.locator(".modlab-calibrate-ratio").first.click()
    nb.page.wait_for_function("() => /below 100 %/.test(document.querySelector('.modlab-error').innerText)")
    below = """e => e.getBoundingClientRect().top
      - document.querySelector('.mod-calibrate').getBoundingClientRect().bottom"""
    assert 0 <= nb.page.locator(".modlab-error").first.evaluate(below) < 120  # where Find was pressed
    nb.page.locator(".modlab-want-ratio").first.fill("50")
    nb.page.locator(".modlab-calibrate-ratio").first.click()
    nb.python("explorer.wait()")
    nb.wait_idle()


def test_the_speed_is_measured_on_request(nb: Notebook) -> None:
    assert not nb.page.locator(".modlab-speed").first.is_visible()
    nb.page.locator(".modlab-measure-speed").first.click()
    nb.page.wait_for_function(
        "() => /tok/.test(document.querySelector('.modlab-speed').innerText)", timeout=120_000
    )
    nb.python("explorer.wait()")
    nb.wait_idle()
    said = nb.page.locator(".modlab-speed >> xpath=..").first.inner_text()
    assert re.search(r"(faster|slower): a token [\d.]+ ms, dense [\d.]+ ms", said)
    assert re.search(r"first token [\d.]+ ms, dense [\d.]+ ms", said) and "cpu" in said


def test_first_tokens_that_are_always_kept_are_named(nb: Notebook) -> None:
    key = nb.page.locator(".mod-key").first.inner_text()
    assert "always kept" in key and "dense layer" in key


def test_the_switch_shows_another_model(nb: Notebook, shots: Path) -> None:
    nb.page.locator(".modlab-form").first.select_option("keys and values")
    nb.page.wait_for_function(
        "() => document.querySelector('.mod-heat h3').innerText.includes('keys and values')"
    )
    nb.python("explorer.wait()")
    nb.wait_idle()
    assert "dropped" in nb.page.locator(".mod-key").first.inner_text()
    assert kernel(nb, "explorer.form") == "keys and values"
    p = nb.drag(".modlab-threshold", 0.65)
    wait_measured(nb, p)
    assert float(kernel(nb, "other.mod.thresholds[1]")) == p != float(kernel(nb, "model.mod.thresholds[1]"))


def test_keys_and_values_are_switched_to_fewer_bits(nb: Notebook, shots: Path) -> None:
    switch, more = nb.page.locator(".modlab-stored-in").first, ".modlab-kv >> xpath=.."
    before = int(kernel(nb, "explorer.summary['kv_bytes']"))
    assert switch.is_visible() and switch.input_value() == "auto"
    switch.select_option("int8")
    until(nb, "explorer.summary['kv_cache_dtype'] == 'int8' and explorer.wait()")
    nb.wait_idle()
    assert kernel(nb, "other.mod.config.kv_cache_dtype") == "int8" and switch.input_value() == "int8"
    assert int(kernel(nb, "explorer.summary['kv_bytes']")) < before
    assert "keys and values in eight bits" in nb.page.locator(more).first.inner_text()
    nb.screenshot(shots / "explorer-eight-bits")
    p = nb.drag(".modlab-threshold", 0.3, release=False)
    wait_preview(nb)
    # The page's own sum: four bytes a number in dense layers, one and a step of two bytes in routed ones.
    kept = f"explorer.trace.preview_keep({p}).mean()"
    dense, stored = 3 * 2 * 2 * 16 * 4, 3 * 2 * 2 * (16 + 2)
    recent = "explorer.trace.keep_recent / len(explorer.tokens)"
    share = f"({kept} + (1 - {kept}) * {recent})"
    want = float(kernel(nb, f"len(explorer.tokens) * ({dense} + {stored} * {share})"))
    assert float(read(nb, "kv").split()[1]) == pytest.approx(want / 1024, rel=0.01)
    nb.page.mouse.up()
    wait_measured(nb, p)
    switch.select_option("auto")
    until(nb, "explorer.summary['kv_cache_dtype'] == 'auto' and explorer.wait()")
    nb.wait_idle()
    assert kernel(nb, "other.mod.config.kv_cache_dtype") == "auto"
    assert "eight bits" not in nb.page.locator(more).first.inner_text()
    nb.python("explorer.switch('whole layers'); explorer.wait()")
    nb.wait_idle()
    assert "skips" in nb.page.locator(".mod-key").first.inner_text()
    assert nb.page.locator(".modlab-stored-in").first.is_hidden(), "no keys of their own to round"


def test_a_busy_model_is_told(nb: Notebook) -> None:
    nb.python(
        "import time\ngood = model.forward\n"
        "def slow(*a, **k):\n    time.sleep(3)\n    return good(*a, **k)\n"
        "model.forward = slow"
    )
    first = nb.drag(".modlab-threshold", 0.7)
    nb.page.wait_for_function("() => document.querySelector('.modlab-badge').dataset.state === 'running'")
    assert "running the model" in read(nb, "badge") and nb.page.locator(".modlab-job").first.is_visible()
    last = nb.drag(".modlab-threshold", 0.55)  # asked for in the middle of a run: the next one
    wait_measured(nb, last)
    assert first != last and float(kernel(nb, "model.mod.thresholds[1]")) == last
    nb.python("model.forward = good")


def test_a_kernel_that_is_gone_is_told(nb: Notebook) -> None:  # the last one: it takes the kernel away
    nb.check()
    nb.ignore_console.append(re.compile(".*"))
    nb.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    nb.drag(".modlab-threshold", 0.7)
    how = nb.page.locator(".modlab-how").first
    nb.page.wait_for_function(
        "e => e.innerText.includes('No kernel answers')", arg=how.element_handle(), timeout=15_000
    )
    assert nb.page.locator("canvas.modlab-heatmap").first.get_attribute("data-state") == "preview"
    open_own_text(nb).press("Control+Enter")
    nb.page.wait_for_function(
        "() => /No kernel answers/.test(document.querySelector('.mod-job-text').innerText)"
    )
