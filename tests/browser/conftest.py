"""One JupyterLab and one Chromium for all browser tests; notebooks made on the spot; screenshots kept."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.browser.notebook_browser import HarnessError, JupyterLab, find_chromium
from tests.helpers.launch import python_path

ROOT = Path(__file__).resolve().parents[2]


def missing() -> str:
    """What keeps the browser tests from running here; "" for nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    try:
        find_chromium()
    except HarnessError as problem:
        return str(problem)
    return ""


@pytest.fixture(scope="session")
def lab() -> Iterator[JupyterLab]:
    """JupyterLab and Chromium. Without a browser the tests are skipped, in CI they fail."""
    if why := missing():
        if os.environ.get("CI"):
            pytest.fail(f"CI is set, so browser tests may not be skipped: {why}")
        pytest.skip(why)
    # Threads: two kernels on two cores otherwise slow each other down.
    with JupyterLab(env={"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}) as lab:
        yield lab


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where screenshots are kept for people to look at (ignored by git)."""
    folder = ROOT / "artefacts"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a notebook file of these code cells."""

    def make(*sources: str, name: str = "made") -> Path:
        made: Any = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        path = tmp_path_factory.mktemp("notebook") / f"{name}.ipynb"
        nbformat.write(made, path)
        return path

    return make
