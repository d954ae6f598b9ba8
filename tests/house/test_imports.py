# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Imports point one way, and importing the package touches neither a GPU nor what only some layers need."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
FILES = sorted((SOURCE / "peft").rglob("*.py"))

# What each room may import of `peft`; the longest prefix that a file's module has decides. Utilities stand below all.
COMMON = ("peft.utils", "peft.import_utils")
ROOMS = {
    "peft.dora.kernels": ("peft.dora.kernels",),
    "peft.dora": ("peft.dora", *COMMON),
    "peft.weights": ("peft.weights", *COMMON),
    "peft.engine": ("peft.engine", "peft.weights", "peft.config", "peft.tuners._registry", *COMMON),
    "peft.tuners": ("peft.tuners", "peft.engine", "peft.weights", "peft.dora", "peft.config", *COMMON),
}
# Never at import time, and triton only ever from the kernels.
HEAVY = ("triton", "bitsandbytes", "torchao", "hqq", "gptqmodel", "awq", "aqlm", "eetq", "transformer_engine")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(tree: ast.AST, into_functions: bool = True):
    """Every node that runs: bodies of `if TYPE_CHECKING` left out, those of functions on request."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        yield node
        if into_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from walk(node, into_functions)


def imported(path: Path, into_functions: bool = True) -> set[str]:
    """The modules that a file imports, by absolute name; `from a import b` gives `a.b` where that is a module of ours."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), into_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = SOURCE.joinpath(*base.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.add(f"{base}.{alias.name}" if is_module else base)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    room = max((prefix for prefix in ROOMS if within(name, (prefix,))), key=len, default=None)
    if room is None:
        return
    wrong = {other for other in imported(path) if within(other, ("peft",)) and not within(other, ROOMS[room])}
    assert not wrong, f"{name} imports {sorted(wrong)}; {room} may import {ROOMS[room]}"


def test_the_check_of_directions_can_fail(tmp_path):
    path = SOURCE / "peft" / "dora" / "reference.py"
    assert "torch" in imported(path)
    assert not within("peft.engine.layer", ROOMS["peft.dora"])
    assert not within("peft.dora.norm", ROOMS["peft.dora.kernels"])
    assert within("peft.dora.kernels.tiles", ROOMS["peft.dora.kernels"])


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_kernels_import_triton(path):
    if within(module_name(path), ("peft.dora.kernels",)):
        return
    assert not {name for name in imported(path) if within(name, ("triton",))}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_heavy_is_imported_at_the_top(path):
    if within(module_name(path), ("peft.dora.kernels",)):
        return
    assert not {name for name in imported(path, into_functions=False) if within(name, HEAVY)}


def test_the_engine_knows_no_method_by_name():
    methods = re.compile(r"lora|dora|vera|boft|loha|lokr|adalora|ia3|miss|shira", re.IGNORECASE)
    public = {"supports_lora_conversion"}  # a question of the public interface that every tuner answers
    words = re.compile(r"[a-z0-9]+")
    for path in sorted((SOURCE / "peft" / "engine").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            if not isinstance(name, str) or name in public:
                continue
            named = [word for word in words.findall(name.lower()) if methods.fullmatch(word)]
            assert not named, f"{path.name}:{getattr(node, 'lineno', 0)} names a method: {name}"


def test_importing_peft_stays_lean():
    # What transformers and accelerate import by themselves is not ours to judge: they come first, and are taken off.
    program = (
        "import sys, torch, transformers, accelerate\n"
        "before = set(sys.modules)\n"
        "import peft\n"
        f"print(sorted(set({HEAVY!r}) & (set(sys.modules) - before)), torch.cuda.is_initialized())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"
