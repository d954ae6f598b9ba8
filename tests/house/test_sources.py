# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The shape of the sources: licence, module docstring, lengths, and docstrings that name the arguments there are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LICENCE = "# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0."
FOLDERS = ("src", "tests", "examples", "benchmarks", "docs/source")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "src")]
FILE_LINES = 550
FUNCTION_LINES = 90


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_file_says_licence_and_purpose_and_is_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == LICENCE, "the first line is the licence line"
    assert ast.get_docstring(ast.parse(text)), "a module docstring says what the file is for"
    assert text.count("\n") <= FILE_LINES, f"more than {FILE_LINES} lines: split it by ideas"


def body_lines(node: ast.FunctionDef) -> int:
    """Lines from the first statement after the docstring to the end."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return node.end_lineno - first.lineno + 1


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
def test_functions_are_short(path):
    long = [node.name for node in functions(ast.parse(path.read_text("utf-8"))) if body_lines(node) > FUNCTION_LINES]
    assert not long, f"longer than {FUNCTION_LINES} lines: {long}"


def is_stub(node: ast.FunctionDef) -> bool:
    """A body of nothing but `pass` or `...`, in a function that is no abstract method and no overload."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    if "abstractmethod" in decorators or "overload" in decorators:
        return False
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return all(
        isinstance(item, ast.Pass) or (isinstance(item, ast.Expr) and getattr(item.value, "value", 0) is ...)
        for item in body
    ) and not (ast.get_docstring(node) and not body)


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
def test_nothing_is_left_undone(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    stubs = [node.name for node in functions(ast.parse(text)) if is_stub(node)]
    protocols = {
        node.name
        for owner in ast.walk(ast.parse(text))
        if isinstance(owner, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in owner.bases)
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    }
    assert not set(stubs) - protocols


def documented_arguments(docstring: str) -> list[str]:
    """The names under `Args:`, in both house styles: `name: …` and ``name (`type`): …``."""
    section = re.search(r"^Args:\n((?:[ ]{4,}.*\n|\n)+)", docstring + "\n", re.MULTILINE)
    if section is None:
        return []
    names = []
    for line in section[1].splitlines():
        entry = re.match(r"^ {4}((?:\*{0,2}[A-Za-z_]\w*)(?:, *\*{0,2}[A-Za-z_]\w*)*)(?: *\(.*?\))?:", line)
        if entry:
            names += [name.strip(" *") for name in entry[1].split(",")]
    return names


def signature_arguments(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [argument.arg for argument in (*named, *rest) if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
def test_docstrings_name_the_arguments_that_there_are(path):
    wrong = []
    for node in functions(ast.parse(path.read_text(encoding="utf-8"))):
        named = documented_arguments(ast.get_docstring(node) or "")
        if not named:
            continue
        there = signature_arguments(node)
        unknown = [name for name in named if name not in there]
        missing = [name for name in there if name not in named and not name.startswith("_") and name != "kwargs"]
        if unknown or missing:
            wrong.append(f"{node.name}: unknown {unknown}, missing {missing}")
    assert not wrong, "\n".join(wrong)


def public_names(tree: ast.Module):
    """The module-level functions and classes whose names are public."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", PACKAGE, ids=identify)
def test_public_functions_and_classes_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kernels = {node.name for node in functions(tree) if "triton" in " ".join(map(ast.unparse, node.decorator_list))}
    bare = [node.name for node in public_names(tree) if not ast.get_docstring(node) and node.name not in kernels]
    assert not bare, f"without a docstring: {bare}"


def test_the_docstring_lint_can_fail():
    code = 'def f(a, b):\n    """F.\n\n    Args:\n        a: One.\n        c (`int`): Two.\n    """\n    return a\n'
    node = ast.parse(code).body[0]
    assert documented_arguments(ast.get_docstring(node)) == ["a", "c"]
    assert signature_arguments(node) == ["a", "b"]
    assert is_stub(ast.parse("def f():\n    pass\n").body[0])
    assert not is_stub(ast.parse("def f():\n    return 1\n").body[0])
