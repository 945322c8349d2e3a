"""Who imports whom: no cycles but those that docs/design.md argues, and the rooms that few may enter."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    """`modlab.cache.bytes`; a package by the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for path in (ROOT / "modlab").rglob("*.py")
    if not {"_notebooks", "_results", "demo", "routers"} & set(path.parts)
}


def without(tree: ast.Module, lazy: bool) -> list[ast.AST]:
    """The nodes that can run: not what only type checkers read, and inside functions only if `lazy`."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        found.append(node)
        waiting += ast.iter_child_nodes(node)
    return found


def imports(source: str, modules: set[str], lazy: bool) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for node in without(ast.parse(source), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found |= {full if full in modules else node.module} & modules
    return found


def graph(lazy: bool) -> Graph:
    return {
        name: imports(path.read_text(encoding="utf-8"), set(MODULES), lazy) - {name}
        for name, path in MODULES.items()
    }


def cycle(edges: Graph) -> list[str]:
    """Some cycle, as the modules on it; [] if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(edges[name]):
                if found := walk(target, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def table(head: str) -> list[list[str]]:
    """The rows of the table of docs/design.md that has this head; names in backticks, without them."""
    body = DESIGN.split(head)[1].split("\n\n")[0]
    rows = [line.strip("| ").split("|") for line in body.splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


ARGUED = [(names(row[0])[0], names(row[1])[0]) for row in table("| from | to | why |")]
ROOMS = {names(row[0])[0]: names(row[1]) if len(row) > 1 else [] for row in table("| room | imported by |")}


def test_a_cycle_is_found_wherever_it_is() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    source = "import m.a\nif TYPE_CHECKING:\n    import m.b\ndef f():\n    from m import c, d\n"
    assert imports(source, {"m", "m.a", "m.b", "m.c"}, lazy=False) == {"m.a"}
    assert imports(source, {"m", "m.a", "m.b", "m.c"}, lazy=True) == {"m.a", "m.c", "m"}


def test_no_import_at_load_time_is_part_of_a_cycle() -> None:
    assert cycle(graph(lazy=False)) == []


def test_inside_functions_only_the_argued_cycles() -> None:
    edges = graph(lazy=True)
    at_load = graph(lazy=False)
    for source, target in ARGUED:
        assert target in edges[source] - at_load[source], f"no function of {source} imports {target}"
        edges[source].discard(target)
    assert cycle(edges) == [], "break the cycle, or argue it in docs/design.md"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_that_few_enter(room: str) -> None:
    found = {
        name
        for name, targets in graph(lazy=True).items()
        for target in targets
        if target.split(".")[1:2] == [room] and name.split(".")[1:2] not in ([], [room])
    }
    assert {name.split(".")[1] for name in found} == set(ROOMS[room]), sorted(found)
