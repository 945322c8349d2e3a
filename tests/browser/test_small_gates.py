"""Gates near 0, as routers of real models have them: sliders by share, and what they were trained for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser.helpers import kernel, until
from tests.browser.notebook_browser import JupyterLab, Notebook

pytestmark = pytest.mark.browser

SETUP = """\
import modlab
from modlab.routing.trained import Trained
from modlab.widgets.pictures.page import keeping_one_in
from tests.helpers.models import dense_llama, scatter_gates
from tests.helpers.tokenizers import make_tokenizer
config = modlab.MoDConfig(skip="kv", layers="all", keep_recent=24, gates="kv_head")
model, tokenizer = scatter_gates(modlab.convert(dense_llama(), config), scale=12.0), make_tokenizer()
for name, values in model.named_parameters():
    if name.endswith("mod_router.bias"):
        values.data.fill_(-7.0)
text = "the router decides which token runs and which token skips, and so on to the end.\\n" * 6
trace = modlab.trace(model, tokenizer, text)
twice, fourfold, eightfold = sorted(keeping_one_in(trace, [8, 4, 2]))
modlab.set_threshold(model, twice)
model.mod.trained = Trained(savings={2.0: twice, 4.0: fourfold, 8.0: eightfold}, reached=4.0)
view = modlab.widgets.Thresholds(model, tokenizer, text)
view"""
PATH = "path = modlab.widgets.TokenPath(view.trace)\npath"


@pytest.fixture(scope="module")
def nb(lab: JupyterLab, notebook: Callable[..., Path]) -> Iterator[Notebook]:
    with lab.open(notebook(SETUP, PATH, name="small_gates"), timeout=120) as nb:
        nb.run_all()
        yield nb
        nb.check()


@contextmanager
def measured(nb: Notebook) -> Iterator[None]:
    """What is done inside has a run of the model as its consequence, and the page shows it."""
    run = kernel(nb, "view.summary['run']")
    yield
    until(nb, f"view.summary['run'] > {run}")
    nb.python("view.wait(60)")
    nb.wait_idle()
    nb.page.wait_for_function("() => document.querySelector('.modlab-badge').dataset.state === 'measured'")


def test_a_layers_slider_asks_for_a_share_where_p_says_little(nb: Notebook, shots: Path) -> None:
    assert float(kernel(nb, "trace.gate.max()")) < 0.05
    with measured(nb):
        halvings = nb.drag(".modlab-layer-threshold", 2.0)  # of the first routed layer: one in four
    layer = int(kernel(nb, "view.trace.layers[0]"))
    p = float(kernel(nb, f"model.mod.thresholds[{layer}]"))
    rows = f"trace.gate[[i for i, l in enumerate(trace.layers) if l == {layer}]]"
    assert 0 < p < 0.05
    assert float(kernel(nb, f"({rows} >= {p}).mean()")) == pytest.approx(2**-halvings, abs=0.03)
    others = kernel(nb, f"{{v for l, v in model.mod.thresholds.items() if l != {layer}}} == {{twice}}")
    assert others == "True"  # the slider of one layer
    said = nb.page.locator(".mod-layer-slider").first.inner_text()
    assert "keeps" in said and "\n0\n" not in said  # p with its figures, not rounded to nothing
    nb.page.screenshot(path=shots / "small-gates.png")


def test_the_slider_says_when_the_routers_were_not_trained_for_it(nb: Notebook, shots: Path) -> None:
    nb.python("view.apply(twice)")
    nb.wait_idle()
    warning = nb.page.locator(".modlab-beyond")
    assert warning.is_hidden()
    nb.drag(".modlab-threshold", 4.0, release=False)  # one in 16: beyond 4x; 8x is known, not trained for
    nb.page.wait_for_function("() => !document.querySelector('.modlab-beyond').hidden")
    with measured(nb):
        nb.page.mouse.up()
    p = float(kernel(nb, "view.thresholds[view.trace.layers[0]]"))
    tail = kernel(nb, f"model.mod.trained.warning_for({p})").partition(" lies")[2]
    assert tail and warning.inner_text().endswith(tail)
    nb.page.screenshot(path=shots / "small-gates-beyond.png")
    with measured(nb):
        nb.drag(".modlab-threshold", 0.5)
    assert warning.is_hidden()


def test_the_key_names_what_there_is(nb: Notebook) -> None:
    key = nb.page.locator(".mod-key").first.inner_text()
    assert "kept" in key and "dense layer" not in key  # all layers are routed
    assert "the latest 24 in it" in nb.page.locator(".mod-figures").first.inner_text()


def test_a_tokens_gates_can_be_told_from_the_threshold(nb: Notebook, shots: Path) -> None:
    """Between 0 and 1 all of them would be a line at the bottom."""
    nb.python("path.cursor = 60")
    nb.page.locator("svg.modlab-path .mod-level").first.wait_for(state="attached")
    nb.wait_idle()
    top, base = (8, 58)
    heights = nb.page.evaluate(
        "() => [...document.querySelectorAll('svg.modlab-path .mod-level')].map(e => +e.getAttribute('y1'))"
    )
    assert len(heights) == int(kernel(nb, "trace.num_layers")) and all(
        top + 5 < y < base - 5 for y in heights
    )
    bars = nb.page.evaluate(
        "() => [...document.querySelectorAll('svg.modlab-path .mod-station rect')]"
        ".filter(e => e.classList.contains('mod-hollow') || e.getAttribute('fill')?.startsWith('rgb'))"
        ".map(e => +e.getAttribute('height')).filter(h => h > 5).length"
    )
    assert bars
    nb.page.locator("svg.modlab-path").screenshot(path=shots / "small-gates-path.png")
