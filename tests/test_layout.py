"""The tests' own house: they mirror the package, share code through helpers, and import it in one way."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, python_path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "modlab"
FILES = sorted(TESTS.rglob("*.py"))
OUTSIDE = {"helpers", "browser", "benchmarks", "scripts"}  # what they test is not a folder of the package


def imported(tree: ast.AST) -> list[str]:
    """Every module that a file imports, as written; relative ones begin with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def complaints(name: str, source: str) -> list[str]:
    """What a file's imports of test code do wrong; `name` is its path below tests."""
    found = []
    for module in imported(ast.parse(source)):
        parts = module.split(".")
        if module.startswith("."):
            found.append(f"{name}: relative import {module}")
        elif parts[0] == "tests" and parts[1] != "helpers":
            own_folder = parts[1] == name.split("/")[0] and len(parts) > 3
            if not own_folder or parts[2].startswith("test_"):
                found.append(f"{name}: {module} is neither in tests/helpers nor shared by its folder")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "from .conftest import x",
        "from tests.conftest import x",
        "from tests.cache.test_ragged import x",
        "import tests.test_data",
        "from tests.measure.models import x",
        "def f():\n    from tests.browser.test_page import x",
    ],
)
def test_the_rule_can_say_no(source: str) -> None:
    assert complaints("browser/test_explorer.py", source)
    assert not complaints("cli/test_probe.py", "from tests.helpers.models import tiny_config")


def test_shared_code_is_in_helpers_and_imports_are_absolute() -> None:
    found = []
    for file in FILES:
        name = file.relative_to(TESTS).as_posix()
        found += complaints(name, file.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_test_code_named_in_cells_and_commands_is_there() -> None:
    """Browser tests name it inside strings, where no import fails before a kernel runs."""
    for file in FILES:
        for module in re.findall(r"from (tests\.[\w.]+) import [a-z]", file.read_text(encoding="utf-8")):
            path = TESTS.parent / module.replace(".", "/")
            if "conftest" in module or module.split(".")[-1].startswith("test_"):
                continue  # an example above
            assert path.with_suffix(".py").is_file(), f"{file.name} names {module}"


def test_folders_mirror_the_package() -> None:
    rooms = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
    folders = {f.name for f in TESTS.iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders - OUTSIDE <= rooms


def replaced_paths(tree: ast.AST) -> list[int]:
    """Lines that put something else than `python_path()` in the place of PYTHONPATH."""
    entries = [
        pair
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for pair in zip(node.keys, node.values, strict=True)
    ]
    return [
        value.lineno
        for key, value in entries
        if key is not None and ast.unparse(key) == "'PYTHONPATH'" and ast.unparse(value) != "python_path()"
    ]


def test_processes_of_tests_keep_what_is_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another transformers or Triton to test with stands there; a process without it tests something else."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert python_path().split(os.pathsep) == [str(ROOT), "elsewhere"]
    monkeypatch.delenv("PYTHONPATH")
    assert python_path() == str(ROOT)
    assert replaced_paths(ast.parse('{**environ, "PYTHONPATH": str(ROOT)}'))
    for file in (*FILES, *(TESTS.parent / "benchmarks").rglob("*.py")):
        lines = replaced_paths(ast.parse(file.read_text(encoding="utf-8")))
        assert not lines, f"{file}: line {lines} replaces PYTHONPATH; take tests.helpers.launch.python_path()"
