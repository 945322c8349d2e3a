"""What several browser tests read from a page or ask of a kernel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.browser.notebook_browser import Notebook

MODEL = """\
import modlab
from tests.helpers.models import routed_llama
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.traces import make_trace
model, tokenizer = routed_llama(), make_tokenizer()
"""
"""First lines of a notebook on the tiny converted Llama."""

# The contrast (WCAG) of every piece of text that lies on a ground of its own, or on the view's.
CONTRASTS = """() => {
  const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= 0.04045
    ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = getComputedStyle(document.querySelector('.modlab')).backgroundColor;
  const all = '.modlab-how, .mod-name, .mod-value, .mod-tip div, .mod-token, .mod-note, .mod-field, '
    + '.modlab-text-note, .mod-own-bar button, .modlab-own-area';
  return [...document.querySelectorAll(all)].map(e => {
    const s = getComputedStyle(e), own = s.backgroundColor;
    const behind = own === 'rgba(0, 0, 0, 0)' ? ground : own;
    const [a, b] = [lum(s.color), lum(behind)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); }); }"""

# Where all curves of the page run.
CURVES = """() => [...document.querySelectorAll('svg.modlab-curve polyline')]
  .map(e => e.getAttribute('points')).join()"""

# The numbers of the layers are drawn in a light colour.
BRIGHT_LABELS = """() => {
  const c = document.querySelector('canvas.modlab-heatmap'), g = c.getContext('2d');
  const d = g.getImageData(0, 0, 50, c.height).data;
  for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200 && d[i] + d[i + 1] + d[i + 2] > 500) return true;
  return false; }"""


def read(nb: Notebook, what: str) -> str:
    return nb.page.locator(f".modlab-{what}").first.inner_text()


def kernel(nb: Notebook, expression: str) -> str:
    return nb.python(f"print({expression})").strip()


def until(nb: Notebook, expression: str, seconds: float = 60) -> None:
    """Until the expression is true in the kernel; `seconds` only ends a test that would wait for ever."""
    end = time.monotonic() + seconds
    while (told := kernel(nb, f"bool({expression})")) != "True":
        assert time.monotonic() < end, f"{expression} is still {told}"
        nb.page.wait_for_timeout(50)


def settled(nb: Notebook, widget: str) -> None:
    """Until the widget's job is over, in the kernel and on the page."""
    nb.python(f"{widget}.wait(60)")
    nb.wait_idle()


@contextmanager
def answered(nb: Notebook, widget: str) -> Iterator[None]:
    """What is done inside makes the page ask the kernel, after a moment; it ends with the answer."""
    before = kernel(nb, f"{widget}.job['id']")
    yield
    until(nb, f"{widget}.job['id'] > {before}")
    settled(nb, widget)


def wait_preview(nb: Notebook) -> None:
    """While the slider is held: until the page has drawn what the browser alone knows."""
    nb.page.wait_for_function(
        """() => ['canvas.modlab-heatmap', '.modlab-badge'].every(
                     css => document.querySelector(css).dataset.state === 'preview')"""
    )


def wait_measured(nb: Notebook, p: float) -> None:
    """Until the kernel has answered for p and the page shows it."""
    nb.page.wait_for_function(
        """p => { const c = document.querySelector('canvas.modlab-heatmap').dataset,
                   b = document.querySelector('.modlab-badge').dataset;
                 return c.state === 'measured' && b.state === 'measured' && Number(c.threshold) === p; }""",
        arg=p,
    )
    nb.wait_idle()


def settle(page: Any) -> None:
    """Until two frames have been drawn."""
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
