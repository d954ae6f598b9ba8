# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Pages say what is so: links resolve, contents are whole, code runs, and the table of results is that of the rows."""

import ast
import doctest
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "source"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*/*.md")])


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_contents_list_every_page_once():
    sections = yaml.safe_load((DOCS / "_toctree.yml").read_text("utf-8"))
    listed = [page["local"] for section in sections for page in section["sections"]]
    there = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_within_the_repository_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_python_in_pages_parses_and_imports_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "peft":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("package_reference/*.md")), ids=identify)
def test_reference_names_what_there_is(page):
    names = re.findall(r"^\.\. auto\w+:: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", ["dora_finetuning", "sft_trl", "diffusion_dora"])
def test_options_in_the_examples_readme_are_the_scripts(name):
    text = (ROOT / "examples" / name / f"{name}.py").read_text("utf-8")
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text))
    readme = (ROOT / "examples" / name / "README.md").read_text("utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme))
    assert options == named - {"--no-dora", "--no-triton"}


@pytest.mark.filterwarnings("ignore")
def test_the_quicktour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in blocks(DOCS / "quicktour.md", "python"):
        exec(compile(block, "quicktour.md", "exec"), scope)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert "trainable params" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=identify)
def test_sessions_in_pages_run_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    assert test.examples
    report = []
    results = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(
        test, out=report.append
    )
    assert not results.failed, "".join(report)


def test_a_part_of_a_page_is_rewritten_between_its_marks():
    between = runpy.run_path(str(ROOT / "docs" / "marked.py"))["between"]
    assert between("head\n<a>\nold\n<b>\ntail\n", "<a>", "<b>", "new") == "head\n<a>\nnew\n<b>\ntail\n"
    for page in ("no marks", "<a> alone", "<b> before <a>", "<a> <b> <a> <b>", "<a> <b> <b>"):
        with pytest.raises(ValueError, match="expected the marks"):
            between(page, "<a>", "<b>", "new")


def test_tables_of_results_are_those_of_the_rows():
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_what_it_works_with_is_that_of_the_tests(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    script = ROOT / "docs" / "works_with.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = tmp_path / "tests"
    tests.mkdir()
    mark = '@pytest.mark.works_with("a library", "a call")\n'
    (tests / "test_a.py").write_text(f"import pytest\n\n{mark}@pytest.mark.gpu\ndef test_it():\n    pass\n")
    works_with = runpy.run_path(str(script))
    assert works_with["table"](tests).splitlines()[2] == (
        "| a library | a call (on a GPU) | [test_a.py](tests/test_a.py) |"
    )
    (tests / "test_a.py").write_text(
        "import pytest\n\n@pytest.mark.works_with('a library')\ndef test_it():\n    pass\n"
    )
    with pytest.raises(ValueError, match="two strings"):
        works_with["table"](tests)
