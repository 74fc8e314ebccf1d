"""The imports of `memkern`, read from its sources: one way only, no circle, no file or class that grew too large.

`pytest -s tests/test_layout.py` prints the rooms, the floors and the circles.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "memkern"
PACKAGE = "memkern"

ORDER = """
version errors documents
roles
actions
policy
presets
scope
plan
seen
ledger
coalesce
ops
timings
embeddings
pipelines.holders
pipelines.family
pipelines.attention
pipelines.session
pipelines.prompt
pipelines.unet
pipelines.status
pipelines.attached
pipelines.patch
pipelines.requests
pipelines.instance
pipelines.patching
pipelines.support
pipelines.probe
pipelines
tuning
testing
info
benchmark
.
demo
audit
explore
cli
__main__
"""
"""Bottom to top: a module imports from the lines above its own, and from its own line. A name stands for all below it
that has no line of its own; "." is the package's `__init__`. Names without a module do no harm."""

COMPILED = ("_C", "_cuda")
"""Modules that are not of Python."""

FILE_LINES, CLASS_LINES = 400, 200

FLOORS = {name: floor for floor, line in enumerate(ORDER.split("\n")) for name in line.split()}


@cache
def modules() -> dict[str, Path]:
    """Dotted name within the package → file; the package itself is "."."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "."] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def known(parts: list[str]) -> str | None:
    """The module of that dotted name, or None."""
    name = ".".join(parts) or "."
    return name if name in modules() else None


def imports_of(name: str) -> set[str]:
    """The modules of the package that one imports, anywhere in it: in functions and under TYPE_CHECKING as well."""
    is_package = modules()[name].name == "__init__.py"
    own = [] if name == "." else name.split(".")
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == PACKAGE:
                    found.add(known(rest))
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                up = node.level - 1 if is_package else node.level
                base = own[: len(own) - up] + module
            elif module and module[0] == PACKAGE:
                base = module[1:]
            else:
                continue
            for alias in node.names:
                if alias.name not in COMPILED:
                    found.add(known([*base, alias.name]) or known(base))
    return {one for one in found if one is not None and one != name}


@cache
def graph() -> dict[str, set[str]]:
    """Module → the modules it imports."""
    return {name: imports_of(name) for name in sorted(modules())}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def room_of(name: str) -> str:
    """The folder that a module lies in."""
    if modules()[name].name == "__init__.py":
        return name
    return name.rpartition(".")[0] or "."


def rooms() -> dict[str, set[str]]:
    """Folder → the folders its modules import from."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, imported in graph().items():
        found[room_of(name)] |= {room_of(other) for other in imported} - {room_of(name)}
    return dict(found)


def floors() -> dict[str, int]:
    """Module → the longest way down, of those that are in no circle."""
    within = {name for circle in circles(graph()) for name in circle}

    @cache
    def floor(name: str) -> int:
        below = [floor(other) for other in graph()[name] if other not in within]
        return 1 + max(below, default=0)

    return {name: floor(name) for name in graph() if name not in within}


def order_of(name: str) -> int | None:
    """The line of ORDER that a module is on, by the longest name that it begins with."""
    if name == ".":
        return FLOORS["."]
    parts = name.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((FLOORS[name] for name in names if name in FLOORS), None)


def test_the_graph():
    """Printed with `-s`."""
    by_room = defaultdict(list)
    for name in graph():
        by_room[room_of(name)].append(name)
    by_floor = defaultdict(list)
    for name, floor in floors().items():
        by_floor[floor].append(name)
    print()
    edges = sum(map(len, graph().values()))
    print(f"{len(graph())} modules, {edges} imports, {len(by_room)} rooms, {max(by_floor)} floors")
    for room, names in sorted(by_room.items()):
        print(f"room  {room}: {len(names)} modules, imports from {', '.join(sorted(rooms()[room])) or 'none'}")
    for floor, names in sorted(by_floor.items(), reverse=True):
        print(f"floor {floor:2}: {' '.join(sorted(names))}")
    own = [name for name in graph() if name.startswith("pipelines")]
    inside = {name: {other for other in graph()[name] if other in own} for name in own}
    print(f"circles: {len(circles(graph()))}, of those in pipelines/: {len(circles(inside))}")
    for circle in circles(graph()):
        print(f"circle {' '.join(circle)}")


def test_no_circle():
    assert circles(graph()) == []


def test_every_module_has_its_place():
    assert [name for name in graph() if order_of(name) is None] == [], "give it a line in ORDER"


def test_imports_run_one_way():
    upward = [
        f"{name} imports {other}"
        for name, imported in graph().items()
        for other in sorted(imported)
        if (order_of(other) or 0) > (order_of(name) or 0)
    ]
    assert upward == []


def test_no_large_file():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_no_large_class():
    lines = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name in modules()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: count for name, count in lines.items() if count > CLASS_LINES} == {}


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}}, [["a", "b", "c"], ["d", "e"]]),
    ],
)
def test_circles_are_found(edges, expected):
    assert sorted(circles(edges)) == expected
