"""The cache by layer and KV head in a real JupyterLab, while text is written; once by keyboard alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.helpers import CONTRASTS, CURVES, kernel
from tests.browser.notebook_browser import JupyterLab, Notebook

pytestmark = pytest.mark.browser

SETUP = """\
import modlab
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer
config = modlab.MoDConfig(skip="kv", layers="alternate", keep_recent=24, gates="kv_head")
model = scatter_gates(modlab.convert(dense_llama(), config))
text = "the router decides which token runs and which token skips.\\n" * 8
view = modlab.widgets.CacheView(model, make_tokenizer(), text, max_new_tokens=40)
view"""
# Opacity of the middle of each token's cell in one line, 0..255.
OPACITY = """([line, tokens]) => {
  const e = document.querySelector('canvas.modlab-heatmap'), g = e.getContext('2d');
  const scale = e.width / e.clientWidth, w = Math.min(26, (e.clientWidth - 108) / tokens);
  return [...Array(tokens).keys()].map(t => g.getImageData(
    Math.round((58 + w * (t + 0.4)) * scale), Math.round((4 + 22 * line + 4) * scale), 1, 1).data[3]); }"""


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, notebook: Callable[..., Path]) -> Iterator[Notebook]:
    with lab.open(notebook(SETUP, name="cache"), timeout=120) as nb:
        nb.run_all()
        yield nb
        nb.check()


def generated(nb: Notebook) -> None:
    nb.page.wait_for_function(
        "() => document.querySelector('.modlab-cache-speed').innerText.includes('tok/s')"
        " && document.querySelector('.modlab-badge').dataset.state === 'measured'",
        timeout=60_000,
    )
    nb.python("view.wait(60)")
    nb.wait_idle()


def opacity(nb: Notebook, line: int) -> list[int]:
    return nb.page.evaluate(OPACITY, [line, int(kernel(nb, "len(view.tokens)"))])


def test_what_is_not_kept_fades_as_text_is_written(nb: Notebook, shots: Path) -> None:
    length = int(kernel(nb, "len(view.tokens)"))
    nb.page.locator(".modlab-generate").click()
    generated(nb)
    assert int(kernel(nb, "len(view.tokens)")) > length + 30
    keep = eval(kernel(nb, "view.trace.keep.astype(int).tolist()"))
    recent = int(kernel(nb, "view.trace.keep_recent"))
    for row, line in enumerate((1, 2, 4, 5, 7, 8)):  # 0, 3 and 6 are layers without a router
        seen = opacity(nb, line)
        left = [alpha for alpha, kept in zip(seen, keep[row], strict=True) if not kept]
        assert all(alpha == 255 for alpha, kept in zip(seen, keep[row], strict=True) if kept)
        # Recent ones only, the latest strongest.
        assert all(0 < alpha < 255 for alpha in seen[-recent + 1 :] if alpha != 255)
        fading = [alpha for alpha in left if alpha]
        assert fading == sorted(fading) and len(fading) == len(
            [kept for kept in keep[row][-recent:] if not kept]
        )
    assert nb.page.locator("svg.modlab-curve").is_visible()
    nb.page.screenshot(path=shots / "cache.png")


def test_another_text_of_the_same_length_has_its_own_bytes(nb: Notebook) -> None:
    before = nb.page.evaluate(CURVES)
    nb.python(
        "kept = view.written\n"
        "view.set_trait('written', {**kept, 'kv_bytes': [b * 0.5 for b in kept['kv_bytes']]})"
    )
    nb.page.wait_for_function(f"before => ({CURVES})() !== before", arg=before)
    nb.python("view.set_trait('written', kept)")
    nb.page.wait_for_function(f"before => ({CURVES})() === before", arg=before)


def test_a_heads_name_has_its_figures_a_click_away(nb: Notebook, shots: Path) -> None:
    chips = nb.page.locator(".mod-chip")
    assert chips.count() == 6
    chips.first.click()
    nb.wait_idle()
    (where, head) = chips.first.inner_text().split(".")
    found = f"next(h for h in view.heads if (h['layer'], h['head']) == ({where}, {head}))"
    proof = nb.page.locator(".modlab-head-proof").inner_text()
    assert f"Layer {where}, KV head {head}: " + kernel(nb, f"{found}['name']") in proof
    assert kernel(nb, f"{found}['says']") in proof and "keeps most often" in proof
    assert nb.page.locator(".mod-choice select").input_value() == f"{where}:{head}"
    row = int(kernel(nb, f"view.heads.index({found})"))
    dropped = int(kernel(nb, f"int((~view.trace.keep[{row}]).sum())"))
    assert nb.page.locator(".modlab-text .mod-none").count() == dropped  # the text is coloured by it
    nb.page.screenshot(path=shots / "cache-head.png")
    chips.first.click()
    nb.wait_idle()
    assert nb.page.locator(".modlab-head-proof").inner_text() == ""


def test_with_the_keyboard_alone(nb: Notebook) -> None:
    slider = nb.page.locator(".modlab-threshold")
    slider.focus()
    nb.page.keyboard.press("ArrowRight")
    nb.page.wait_for_function("() => document.querySelector('.modlab-badge').dataset.state === 'preview'")
    nb.page.wait_for_function("() => document.querySelector('.modlab-badge').dataset.state === 'measured'")
    nb.python("view.wait(60)")
    nb.wait_idle()
    p = float(kernel(nb, "view.threshold"))
    assert float(kernel(nb, "model.mod.thresholds[1]")) == p != 0.5 and kernel(nb, "view.written") == "{}"
    assert float(kernel(nb, "(view.trace.gate >= p).mean()".replace("p)", f"{p})"))) == pytest.approx(
        2 ** -float(slider.input_value()), rel=0.1
    )
    reached = []
    for _ in range(40):
        nb.page.keyboard.press("Tab")
        reached.append(nb.page.evaluate("() => document.activeElement.className"))
        if "modlab-generate" in reached[-1]:
            break
    assert "modlab-generate" in reached[-1], reached
    nb.page.keyboard.press("Enter")
    generated(nb)
    assert float(kernel(nb, "view.written['p']")) == p
    for _ in range(40):
        nb.page.keyboard.press("Tab")
        if "mod-chip" in nb.page.evaluate("() => document.activeElement.className"):
            break
    nb.page.keyboard.press("Enter")
    nb.wait_idle()
    assert "KV head" in nb.page.locator(".modlab-head-proof").inner_text()
    assert nb.page.locator(".jp-Cell").count() == 1  # JupyterLab took none of the keys


def test_it_is_readable_in_the_dark(nb: Notebook, shots: Path) -> None:
    try:
        nb.theme("JupyterLab Dark")
        nb.page.wait_for_selector("canvas[data-theme=dark]")
        nb.wait_idle()
        ratios: Any = nb.page.evaluate(CONTRASTS)
        assert min(ratios) >= 4.5
        nb.page.screenshot(path=shots / "cache-dark.png")
    finally:
        nb.theme("JupyterLab Light")
