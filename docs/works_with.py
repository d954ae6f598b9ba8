# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The README's table of what the package works with, made of the tests marked `works_with(library, what)`.

python docs/works_with.py            # print it
python docs/works_with.py --write    # put it into the README
python docs/works_with.py --check    # fail if the README holds another one
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from marked import run

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN = "<!-- works with: begin (docs/works_with.py) -->"
END = "<!-- works with: end -->"
MARK = "works_with"


class Row(NamedTuple):
    """One thing that works, and the test that shows it.

    Args:
        library: Whose loop or call it is.
        what: What of it.
        path: The test's file.
        marks: The names of the test's other marks.
    """

    library: str
    what: str
    path: Path
    marks: frozenset[str]


def marks_of(node: ast.FunctionDef) -> list[tuple[str, list[ast.expr]]]:
    """The `pytest.mark`s of a test as (name, arguments)."""
    found = []
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "pytest.mark":
            found.append((call.attr, decorator.args if isinstance(decorator, ast.Call) else []))
    return found


def rows_of(path: Path) -> list[Row]:
    """The rows of one test file.

    Raises:
        ValueError: A mark does not have two strings.
    """
    rows = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = marks_of(node)
        others = frozenset(name for name, _ in marks if name != MARK)
        for arguments in (arguments for name, arguments in marks if name == MARK):
            values = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
            if len(values) != 2 or len(arguments) != 2 or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{path.name}, {node.name}: expected works_with(library, what), two strings")
            rows.append(Row(values[0], values[1], path, others))
    return rows


def table(tests: Path) -> str:
    """The table of all tests in a folder: a line for each library and test file, by library, in the order of the tests."""
    groups: dict[tuple[str, Path], list[str]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for row in rows_of(path):
            what = f"{row.what} (on a GPU)" if "gpu" in row.marks else row.what
            group = groups.setdefault((row.library, path), [])
            if what not in group:
                group.append(what)
    lines = ["| with | what | tests |", "| --- | --- | --- |"]
    for (library, path), whats in sorted(groups.items(), key=lambda item: (item[0][0].lower(), item[0][1])):
        link = f"[{path.name}]({path.relative_to(tests.parent).as_posix()})"
        lines.append(f"| {library} | {'; '.join(whats)} | {link} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(__doc__, [README], BEGIN, END, table(ROOT / "tests")))
