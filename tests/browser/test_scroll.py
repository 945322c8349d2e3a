"""A view that is to be brought into sight, in a JupyterLab of its own settings, which skip hidden cells."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.helpers import MODEL, until
from tests.browser.notebook_browser import JupyterLab

pytestmark = pytest.mark.browser

VIEW = f"""\
{MODEL}view = modlab.widgets.explore(model, tokenizer, "the router decides which token runs.\\\\n" * 6)
view.scroll_here()
view"""
LONG = "print('a line\\n' * 40)"


def test_run_all_shows_the_view_and_not_the_end(lab: JupyterLab, notebook: Callable[..., Path]) -> None:
    own = {"@jupyterlab/notebook-extension/tracker": {}}
    path = notebook(*[LONG] * 3, VIEW, *[LONG] * 12, name="scroll")
    with (
        JupyterLab(settings=own, env=lab.extra_env, browser=lab.browser) as unlike_tests,
        unlike_tests.open(path, timeout=120) as nb,
    ):
        nb.run_all()
        until(nb, "not view.sought")
        box = nb.page.locator(".modlab[data-view=explorer]").bounding_box()
        assert box and 0 < box["y"] < 200
        nb.check()
