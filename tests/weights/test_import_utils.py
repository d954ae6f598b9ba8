# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Optional packages: found by their metadata, refused when they are too old, and not imported by looking."""

import importlib
import sys

import pytest

from peft import import_utils


@pytest.fixture
def install(monkeypatch, tmp_path):
    """A function that installs an empty package of a given version for the length of the test."""

    def install(name, version):
        root = tmp_path / f"{name}-{version}"
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
        metadata = root / f"{name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(root))

    _forget()
    yield install
    _forget()


def _forget():
    importlib.invalidate_caches()
    for name, value in vars(import_utils).items():
        if name.startswith("is_") and hasattr(value, "cache_clear"):
            value.cache_clear()


SIMPLE = {
    "aqlm": import_utils.is_aqlm_available,
    "eetq": import_utils.is_eetq_available,
    "hqq": import_utils.is_hqq_available,
    "neural_compressor": import_utils.is_inc_available,
    "transformer_engine": import_utils.is_te_available,
    "diffusers": import_utils.is_diffusers_available,
    "optimum": import_utils.is_optimum_available,
}


@pytest.mark.parametrize("package", SIMPLE)
def test_found_when_installed(package, install):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    assert SIMPLE[package]() is False
    install(package, "1.0")
    assert SIMPLE[package]() is False, "answers are remembered"
    _forget()
    assert SIMPLE[package]() is True
    assert package not in sys.modules


def test_torchao_versions(install):
    install("torchao", "0.15.0")
    with pytest.raises(ImportError, match=r"torchao 0\.15\.0 .* 0\.16\.0"):
        import_utils.is_torchao_available()
    install("torchao", "0.17.0")
    _forget()
    assert import_utils.is_torchao_available() and not import_utils.is_torchao_ge_v0_18_0()
    install("torchao", "0.18.0")
    _forget()
    assert import_utils.is_torchao_ge_v0_18_0()


def test_gptqmodel_needs_optimum(install, monkeypatch):
    install("gptqmodel", "6.1.0")
    with pytest.raises(ImportError, match=r"gptqmodel 6\.1\.0 .* 7\.0\.0"):
        import_utils.is_gptqmodel_available()
    install("gptqmodel", "7.0.0")
    _forget()
    with monkeypatch.context() as patch:
        patch.setattr(import_utils, "is_optimum_available", lambda: False)
        with pytest.raises(ImportError, match="optimum is not"):
            import_utils.is_gptqmodel_available()
    install("optimum", "1.23.0")
    _forget()
    with pytest.raises(ImportError, match=r"optimum 1\.23\.0"):
        import_utils.is_gptqmodel_available()
    install("optimum", "1.24.0")
    _forget()
    assert import_utils.is_gptqmodel_available()


def test_bitsandbytes_versions(install):
    install("bitsandbytes", "0.38.1")
    assert import_utils.is_bnb_available() and not import_utils.is_bnb_4bit_available()
    install("bitsandbytes", "0.50.0")
    _forget()
    assert import_utils.is_bnb_4bit_available()


def test_flags_are_bools():
    flags = {name: value for name, value in vars(import_utils).items() if name.startswith("is_transformers")}
    assert len(flags) == 8 and all(isinstance(value, bool) for value in flags.values())
    assert flags["is_transformers_ge_v5"] != flags["is_transformers_le_4_53"]
    assert isinstance(import_utils.is_torch_tpu_available(check_device=False), bool)
    assert isinstance(import_utils.is_xpu_available(check_device=True), bool)
