"""The tree of the package, from the first paragraph of each module's docstring."""

import ast
import re
from pathlib import Path

LEFT_OUT = {"__pycache__", "_notebooks", "_results", "demo"}


def tree(root: Path) -> str:
    """A section for each folder of modlab/: what it is, and a line for each of its files."""
    package = root / "modlab"
    folders = [package, *sorted(path for path in package.rglob("*") if path.is_dir())]
    parts = []
    for folder in folders:
        if LEFT_OUT & set(folder.relative_to(root).parts):
            continue
        if files := sorted(path for path in folder.iterdir() if path.suffix in {".py", ".js", ".cu"}):
            parts.append(section(folder.relative_to(root), files))
    return "\n\n".join(parts)


def section(folder: Path, files: list[Path]) -> str:
    """A heading, what the folder is (its `__init__`), and a list of the others."""
    lines = [f"## `{folder.as_posix()}/`", ""]
    for path in files:
        if path.name == "__init__.py":
            lines += [summary(path), ""]
    lines += [f"- `{path.name}`: {summary(path)}" for path in files if path.name != "__init__.py"]
    return "\n".join(lines).rstrip()


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring or opening comment, on one line; "" where it has none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        opening = re.match(r"(?://[^\n]*\n)+", text)
        said = re.sub(r"^//+ ?", "", opening[0], flags=re.M) if opening else ""
    paragraph = " ".join(said.split("\n\n")[0].split())
    # Of an opening comment the first sentence will do.
    return paragraph if path.suffix == ".py" else re.split(r"(?<=\.) ", paragraph)[0]
