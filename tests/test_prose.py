"""Text in the code: one line says what a module is, letters mean one thing, files that are cited exist."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"_notebooks", "_results", "notebooks"}
PYTHON = sorted(p for f in ("modlab", "benchmarks", "scripts") for p in (ROOT / f).rglob("*.py"))
SOURCES = [path for path in PYTHON if not LEFT_OUT & set(path.relative_to(ROOT).parts)]
MEANING = {
    "B": "row",
    "T": "token",
    "S": "token",
    "K": "key",
    "N": "query head",
    "G": "kv head|gate",
    "H": "head dim",
    "D": "dim|features",
    "L": "layer",
    "V": "vocab",
}
"""Words that the legend of a file must use for the letters of docs/design.md."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def summary(source: str) -> str:
    """The first paragraph of a module's docstring."""
    return (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]


def wrong_letters(source: str) -> list[str]:
    """Letters of a file's legend that mean something else than everywhere."""
    found = re.search(r"Shape letters: (.*?)(?:\n\n|\"\"\"|\. [A-Z])", source, re.S)
    parts = re.split(r",\s*(?=[A-Z]\b)|\band (?=[A-Z]\b)", " ".join(found[1].split())) if found else []
    return [part for part in parts if part[:1] in MEANING and not re.search(MEANING[part[0]], part[1:], re.I)]


def test_the_checks_can_say_no() -> None:
    assert summary('"""One\nline.\n\nMore."""') == "One\nline."
    assert wrong_letters('"""A.\n\nShape letters: B rows, H heads, K keys (of a row).\n"""') == ["H heads"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_module_says_in_one_line_what_it_is(path: Path) -> None:
    said = summary(path.read_text(encoding="utf-8"))
    assert said and "\n" not in said, "the first paragraph of a module's docstring is its line in the tree"


def test_shape_letters_mean_one_thing() -> None:
    found = {
        name(path): wrong_letters(path.read_text(encoding="utf-8"))
        for path in SOURCES
        if name(path).startswith("modlab/")
    }
    assert {file: letters for file, letters in found.items() if letters} == {}, "see docs/design.md"


def test_no_banners() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    banner = re.compile(r"^\s*#\s*[-=]{3,}", re.M)
    assert [name(path) for path in files if banner.search(path.read_text(encoding="utf-8"))] == []


def test_what_is_cited_exists() -> None:
    """Files named by their path, as `docs/design.md` or `execution/reference.py`."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    paths = [f"/{path}" for path in tracked.stdout.splitlines()]
    cited = re.compile(r"(?<![\w/.<{*-])((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|js|cu))\b")
    pages = [*SOURCES, *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    missing = [
        f"{name(page)}: {target}"
        for page in pages
        if page.name != "log.md"  # tells of files as they were
        for target in sorted(set(cited.findall(page.read_text(encoding="utf-8"))))
        if not any(path.endswith(f"/{target}") for path in paths)
    ]
    assert missing == []
