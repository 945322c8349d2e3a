"""The views in a page of their own (to_html): decisions in JavaScript, keys, themes, long texts, bad data."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modlab.traces.routing_trace import RoutingTrace
from modlab.widgets import RoutingHeatmap, TokenPath, TokenText
from tests.browser.helpers import CONTRASTS, settle
from tests.browser.notebook_browser import JupyterLab
from tests.helpers.traces import head_trace, make_trace

pytestmark = pytest.mark.browser
HEATMAP = "canvas.modlab-heatmap"


@pytest.fixture
def show(lab: JupyterLab, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; the test fails in the end if the page logged an error or asked for anything else."""
    wrong: list[str] = []
    opened: list[Any] = []

    def open_page(
        html: str | RoutingTrace, dark: bool = False, width: int = 1100, may_fail: bool = False
    ) -> Any:
        file = tmp_path / f"{len(opened)}.html"
        file.write_text(html if isinstance(html, str) else html.to_html(), encoding="utf-8")
        context = lab.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        opened.append(context)
        page = context.new_page()
        if not may_fail:
            page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith("file:") else wrong.append(r.url))
        page.goto(file.as_uri())
        settle(page)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert not wrong


def set_threshold(page: Any, p: float) -> None:
    """As the slider does while it is dragged."""
    page.locator(".modlab-threshold").evaluate(
        "(e, p) => { e.step = 'any'; e.value = p; e.dispatchEvent(new Event('input')); }", p
    )
    settle(page)


def test_javascript_decides_as_python(show: Callable[..., Any]) -> None:
    grid = np.linspace(0.05, 0.95, 19)
    gate = np.vstack(
        [np.resize(grid, 57), np.random.default_rng(1).uniform(0, 1, 57), np.resize(grid[::-1], 57)]
    )
    trace = make_trace(57, gate=gate, keep=gate >= np.float32(0.5))  # an odd recorded mask: no first tokens
    page = show(trace)
    heatmap = page.locator(HEATMAP)
    assert heatmap.get_attribute("data-state") == "measured"
    assert float(heatmap.get_attribute("data-kept")) == pytest.approx(trace.keep.mean(), abs=6e-5)
    for p in (0.05, 0.1, 0.35, 0.3501, 0.55, 0.6, 0.95):
        set_threshold(page, p)
        assert heatmap.get_attribute("data-state") == "preview"
        kept = trace.preview_keep(p).mean()
        assert float(heatmap.get_attribute("data-kept")) == pytest.approx(kept, abs=6e-5)
        saving = f"{trace.preview_saving(p):.2f}x smaller"
        assert saving in page.locator(".mod-figures").inner_text()
    set_threshold(page, 0.5)  # back at the recorded p the recorded mask shows again, not a comparison
    assert float(heatmap.get_attribute("data-kept")) == pytest.approx(trace.keep.mean(), abs=6e-5)


def test_preview_is_labelled_and_has_no_loss(show: Callable[..., Any]) -> None:
    trace = make_trace()
    page = show(trace)
    assert page.locator(".modlab-badge").inner_text() == "measured"
    assert page.locator(".modlab-loss").inner_text() == f"{trace.mean_loss:.3f}"
    set_threshold(page, 0.7)
    assert page.locator(".modlab-badge").inner_text() == "preview"
    assert page.locator(".modlab-how").inner_text().startswith("Preview from the gates recorded at p 0.5")
    assert page.locator(".modlab-loss").inner_text() == "–"  # a loss cannot be previewed


def test_a_page_takes_no_text_and_says_why(show: Callable[..., Any]) -> None:
    page = show(make_trace())
    assert page.locator(".modlab-own-text").is_disabled()
    assert "needs a notebook with the model" in page.locator(".mod-title").inner_text()
    assert not page.locator(".modlab-own-box").is_visible()


def test_keyboard_moves_locks_and_clears(show: Callable[..., Any]) -> None:
    trace = make_trace(300, tokens=[f"w{i} " for i in range(300)])
    page = show(trace, width=700)
    heatmap, note = page.locator(HEATMAP), page.locator(".mod-text-box .mod-note")
    heatmap.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight"):
        heatmap.press(key)
    settle(page)
    on = page.locator(".mod-on")
    assert on.inner_text() == "w2 " and "token 2 of 300" in note.inner_text()
    row = trace.layers.index(1)
    kept = "kept" if trace.keep[row, 2] else "skipped"
    tip = page.locator(".mod-tip")
    assert "layer 1: gate" in tip.inner_text() and kept in tip.inner_text()
    assert "the first 4 tokens are always kept" in tip.inner_text() or trace.gate[row, 2] >= 0.5
    heatmap.press("End")  # beyond what the width shows: the picture follows
    settle(page)
    assert on.inner_text() == "w299 " and page.locator(".mod-scroll").evaluate("e => e.scrollLeft") > 500
    assert tip.is_visible()
    heatmap.press("Enter")
    page.locator(".mod-title").hover()
    settle(page)
    assert on.inner_text() == "w299 " and "locked" in note.inner_text()
    heatmap.press("Escape")
    settle(page)
    assert on.count() == 0 and not tip.is_visible()


def test_clicking_a_layer_colours_the_text_by_it(show: Callable[..., Any]) -> None:
    trace = make_trace(40)
    page = show(trace)
    box = page.locator(HEATMAP).bounding_box()
    none = page.locator(".modlab-text .mod-none")
    assert none.count() == int((~trace.keep.any(0)).sum())
    page.mouse.click(box["x"] + 44, box["y"] + 4 + 22 * 3.5)  # the number of layer 3
    settle(page)
    assert page.locator(".mod-choice select").input_value() == "3:-1"
    assert none.count() == int((~trace.keep[trace.layers.index(3)]).sum())
    page.locator(".mod-choice select").select_option("-1:-1")
    settle(page)
    assert none.count() == int((~trace.keep.any(0)).sum())


def test_text_shows_the_text(show: Callable[..., Any]) -> None:
    tokens = ["<b>", "&amp;", "", "日本", "🙂", "\n", "</script>", "\t x ", "'\"`"]
    trace = make_trace(9, tokens=tokens)
    assert show(trace).locator(".modlab-text").evaluate("e => e.textContent") == trace.text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_themes_are_readable(show: Callable[..., Any], shots: Path, dark: bool) -> None:
    page = show(make_trace(160, 12), dark=dark)
    page.locator(HEATMAP).hover(position={"x": 300, "y": 110})
    settle(page)
    page.screenshot(path=shots / f"page-{'dark' if dark else 'light'}.png", full_page=True)
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 160 and min(ratios) >= 4.5  # WCAG AA
    ground = page.locator(".modlab").evaluate("e => getComputedStyle(e).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark


def test_nothing_is_wider_than_a_narrow_page(show: Callable[..., Any], shots: Path) -> None:
    page = show(make_trace(200, 32), width=420)
    page.screenshot(path=shots / "page-narrow.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 420


def test_a_very_long_text_stays_fast(show: Callable[..., Any]) -> None:
    page = show(make_trace(65_536, 12))
    took = page.evaluate(
        """async () => {
          const slider = document.querySelector('.modlab-threshold');
          const frame = () => new Promise(requestAnimationFrame);
          const start = performance.now();
          for (let i = 0; i < 10; i++) {
            slider.value = 0.3 + 0.04 * i; slider.dispatchEvent(new Event('input'));
            await frame(); await frame();
          }
          return (performance.now() - start) / 10; }"""
    )
    assert page.locator(HEATMAP).get_attribute("data-threshold") == "0.66"
    assert page.locator(".mod-token").count() >= 65_536
    assert took < 1000, f"{took:.0f} ms a step"
    page.locator(".mod-scroll").evaluate("e => { e.scrollLeft = e.scrollWidth; }")
    settle(page)
    assert page.locator(HEATMAP).evaluate("e => e.width") < 4000  # only what is in view is drawn


def test_zoom_shows_all_tokens_and_single_ones(show: Callable[..., Any]) -> None:
    trace = make_trace(8192, 32)
    page = show(trace)
    heatmap, scroll = page.locator(HEATMAP), page.locator(".mod-scroll")
    width = "e => e.scrollWidth / e.clientWidth"
    assert scroll.evaluate(width) > 50
    heatmap.focus()
    heatmap.press("0")
    settle(page)
    assert scroll.evaluate(width) == pytest.approx(1)
    middle = heatmap.bounding_box()["width"] / 2
    heatmap.hover(position={"x": middle, "y": 4 + 9 * 1.5})  # several tokens a pixel
    settle(page)
    assert 3000 < int(page.locator(".mod-on").get_attribute("data-t")) < 4600
    for _ in range(20):
        page.get_by_role("button", name="zoom in").click()
    settle(page)
    assert scroll.evaluate("e => e.scrollWidth") == pytest.approx(8192 * 40, rel=0.01)  # 40 pixels a token
    before = scroll.evaluate("e => e.scrollLeft")
    heatmap.hover(position={"x": 300, "y": 100})
    page.keyboard.down("Control")
    page.mouse.wheel(0, 60)
    page.keyboard.up("Control")
    settle(page)
    assert scroll.evaluate("e => e.scrollLeft") < before  # zoomed out around the mouse, not scrolled


# Where each cell is full, and where it is a thin line: its upper part has ink or not.
CELLS = """e => {
  const g = e.getContext('2d'), scale = e.width / e.clientWidth, at = (x, y) =>
    g.getImageData(Math.round(x * scale), Math.round(y * scale), 1, 1).data[3] > 200;
  const w = Math.min(26, (e.clientWidth - 108) / 20);
  return [...Array(20).keys()].map(t => at(58 + w * (t + 0.5), 4 + 22 + 4)); }"""


def test_pixels_show_the_decisions(show: Callable[..., Any]) -> None:
    trace = make_trace(20, 2)
    page = show(trace)
    assert page.locator(HEATMAP).evaluate(CELLS) == trace.keep[0].tolist()
    set_threshold(page, 0.8)
    assert page.locator(HEATMAP).evaluate(CELLS) == trace.preview_keep(0.8)[0].tolist()


def test_single_views_have_pages(show: Callable[..., Any]) -> None:
    trace = make_trace(50)
    assert show(RoutingHeatmap(trace).to_html()).locator(HEATMAP).get_attribute("data-kept")
    assert (
        show(TokenText(trace).to_html()).locator(".modlab-text").evaluate("e => e.textContent") == trace.text
    )
    page = show(TokenPath(trace).to_html())
    page.locator(".mod-path-plot").press("End")
    settle(page)
    assert "token 49" in page.locator(".modlab-path-says").inner_text()


def test_where_the_cache_alone_is_routed_every_token_runs(show: Callable[..., Any]) -> None:
    """No way around a layer, and no word of skipping."""
    for skip in ("layer", "kv"):
        page = show(make_trace(50, skip=skip))
        page.locator(".mod-token").nth(30).click()
        settle(page)
        way = page.locator(".modlab-path .mod-way")
        if skip == "layer":
            assert "Q" in (way.get_attribute("d") or "")
        else:
            assert way.count() == 0
        said = page.locator("body").inner_text()
        assert ("skips" in said) == (skip == "layer") and ("dropped" in said) == (skip == "kv")


def test_each_kv_head_has_a_line(show: Callable[..., Any]) -> None:
    trace = head_trace(20, 4)
    page = show(trace)
    heatmap = page.locator(HEATMAP)
    lanes = [4 + 22 * lane + 4 for lane in (1, 2, 4, 5)]  # 0 and 3 are layers without a router
    drawn = [heatmap.evaluate(CELLS.replace("4 + 22 + 4", str(y))) for y in lanes]
    assert drawn == trace.keep.tolist()
    # The slider asks for a share: one token in 2 ** 2.5.
    set_threshold(page, 2.5)
    p = float(np.quantile(trace.gate, 1 - 2**-2.5, method="higher"))
    want = trace.preview_keep(round(p - 5e-5, 4))
    assert page.locator(".modlab-p").inner_text() == f"{1 / (trace.gate >= p).mean():.1f}"
    assert "kept: one in" in page.locator(".mod-slider").inner_text()
    assert [heatmap.evaluate(CELLS.replace("4 + 22 + 4", str(y))) for y in lanes] == want.tolist()
    assert float(heatmap.get_attribute("data-kept")) == pytest.approx(want.mean(), abs=6e-5)
    assert (
        f"{trace.preview_saving(round(p - 5e-5, 4)):.2f}x smaller"
        in page.locator(".mod-figures").inner_text()
    )
    assert "4 KV heads" in page.locator(".mod-figures").inner_text()


def test_a_kv_head_is_pointed_at_and_colours_the_text(show: Callable[..., Any]) -> None:
    trace = head_trace(20, 4)
    page = show(trace)
    heatmap, tip, choice = page.locator(HEATMAP), page.locator(".mod-tip"), page.locator(".mod-choice select")
    heatmap.hover(position={"x": 58 + 200, "y": 4 + 22 * 2.5})
    settle(page)
    t = int(page.locator(".mod-on").get_attribute("data-t"))
    assert f"layer 1, KV head 1: gate {trace.gate[1, t]:.3f}" in tip.inner_text()
    assert f"kept by {trace.keep[:, t].sum()} of 4 KV heads" in tip.inner_text()
    heatmap.focus()
    heatmap.press("ArrowDown")  # over the dense layer to the first head of the next one
    heatmap.press("ArrowDown")
    settle(page)
    assert "layer 3, KV head 0" in tip.inner_text()
    none = page.locator(".modlab-text .mod-none")
    for value, rows in (("3:1", [3]), ("1:-1", [0, 1]), ("-1:-1", [0, 1, 2, 3])):
        choice.select_option(value)
        settle(page)
        assert none.count() == int((~trace.keep[rows].any(0)).sum())


def test_ninety_lines_fit(show: Callable[..., Any]) -> None:
    page = show(head_trace(400, 45, heads=3))  # 22 layers of three heads, 23 without a router
    assert page.locator(HEATMAP).evaluate("e => e.clientHeight") < 330
    first = "() => document.querySelector('.mod-row').getBoundingClientRect().bottom"
    assert page.evaluate(first) < 660


def test_a_shadow_tree_has_the_colours_too(show: Callable[..., Any]) -> None:
    """Where marimo puts widgets."""
    page = show(make_trace(20))
    ink = page.evaluate(
        """() => {
          const host = document.body.appendChild(document.createElement('div'));
          const shadow = host.attachShadow({ mode: 'open' }), style = document.querySelector('style');
          const root = Object.assign(document.createElement('div'), { className: 'modlab' });
          shadow.append(style.cloneNode(true), root);
          style.remove();
          const made = getComputedStyle(shadow.querySelector('.modlab'));
          return ['--mod-ink', '--mod-surface', '--mod-line'].map(name => made.getPropertyValue(name)); }"""
    )
    assert all(ink), ink


def test_a_view_that_cannot_be_drawn_says_so(show: Callable[..., Any]) -> None:
    html = make_trace().to_html().replace('const VIEW = "explorer"', 'const VIEW = "nonsense"')
    page = show(html, may_fail=True)
    assert "could not be drawn" in page.locator("[role=alert]").inner_text()
