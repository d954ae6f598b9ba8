# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What pip and make see: the package's metadata, and targets that do what README says."""

import os
import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("finetune", "test", "test-all", "quality", "style", "bench", "docs")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")  # as in pyproject.toml; older ones write other metadata
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "peft.egg-info"


def test_name_version_and_python(metadata):
    message = message_from_string((metadata / "PKG-INFO").read_text(encoding="utf-8"))
    assert message["Name"] == "peft"
    assert message["Version"] == "0.21.2+triton.1"
    assert message["Version"] in SpecifierSet("==0.21.2")
    assert message["Requires-Python"] == ">=3.10"
    required = {Requirement(line).name for line in message.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {
        "numpy", "packaging", "psutil", "pyyaml", "torch", "transformers", "tqdm", "accelerate", "safetensors",
        "huggingface_hub",
    }  # fmt: skip
    assert {"test", "quality", "docs", "bnb", "triton", "examples"} <= set(message.get_all("Provides-Extra"))


def test_triton_is_asked_for_on_linux_only(metadata):
    lines = (metadata / "PKG-INFO").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line.split(":", 1)[1].strip()) for line in lines if line.startswith("Requires-Dist: triton")]
    assert wanted
    for requirement in wanted:
        assert requirement.marker.evaluate({"platform_system": "Linux", "extra": "triton"}) or "triton" not in str(
            requirement.marker
        )
        for system in ("Darwin", "Windows"):
            assert not requirement.marker.evaluate({"platform_system": system, "extra": "triton"})


def test_the_package_ships_whole(metadata):
    shipped = set((metadata / "SOURCES.txt").read_text(encoding="utf-8").split())
    assert "src/peft/py.typed" in shipped
    packages = {path.parent for path in (ROOT / "src" / "peft").rglob("*.py")}
    assert all((package / "__init__.py").is_file() for package in packages), "a folder of sources lacks __init__.py"


def test_version_of_the_module_is_the_packages():
    import peft

    assert peft.__version__ == "0.21.2+triton.1"


def test_pytest_knows_the_markers(pytestconfig):
    assert {line.split(":")[0] for line in pytestconfig.getini("markers")} >= {"gpu", "interop", "slow"}
    assert pytestconfig.option.strict_markers or "--strict-markers" in pytestconfig.getini("addopts")


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_target_makes_its_environment_first(target, tmp_path):
    venv = tmp_path / "venv"
    command = ["make", "-n", target, f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [
        next(i for i, line in enumerate(lines) if step in line)
        for step in ("-m venv", "pip install --quiet torch==", "pip install --quiet --editable")
    ]
    assert steps == sorted(steps)
    assert len(lines) > steps[-1] + 1, "the environment is made, and then nothing is done in it"


@needs_make
def test_plain_make_prints_every_target():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert set(TARGETS) <= set(re.findall(r"make ([a-z-]+)", done.stdout))


def test_every_make_command_that_a_page_names_exists():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs" / "source").rglob("*.md"), *ROOT.glob("*/README.md")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in pages:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)(?=[ `\n])", page.read_text("utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


@pytest.mark.skipif(sys.platform == "win32", reason="file modes and bash")
def test_ci_runs_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert re.search(r"^make test\b", text, re.MULTILINE)
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
