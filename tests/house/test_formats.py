# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The table of storage formats is whole, is that of the code, and is true of layers that the libraries make."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cases import FORMATS, LAYERS
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.weights import find, find_weight, torchao

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

formats = importlib.import_module("formats")

PLAIN = ("torch.", "transformers.pytorch_utils.")


def test_the_page_says_what_the_code_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "formats.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_quantised_layer_class_has_its_row():
    known = {name for name in find._BY_NAME if not name.startswith(PLAIN)}
    listed = [name for form in formats.FORMS for name in form.layers]
    assert len(listed) == len(set(listed)) and set(listed) == known
    for form in formats.FORMS:
        for name in form.layers:
            layer = SimpleNamespace(weight=torch.zeros(2, 2))
            assert type(find._BY_NAME[name](layer, False)) is form.weight, name
    assert {form.tensor for form in formats.FORMS if form.tensor} == set(torchao._REQUANTISE)


def test_every_format_of_the_matrix_is_in_one_row():
    listed = [case for form in formats.FORMS for case in form.cases]
    assert sorted(listed) == sorted(name for name, form in FORMATS.items() if form.quant is not None)


@pytest.mark.parametrize("form", formats.FORMS, ids=lambda form: form.name)
def test_a_row_is_verified_where_its_tests_import_the_library(form):
    text = (ROOT / "tests" / form.tests).read_text("utf-8")
    if "from makers import" in text:
        text += (ROOT / "tests" / "weights" / "makers.py").read_text("utf-8")
    names = [form.tensor or "", *(name.rpartition(".")[2] for name in form.layers)]
    if not form.verified:
        assert any(name in text for name in names if name), f"{form.tests} knows none of {names}"
        return
    package = (
        form.layers[0].partition(".")[0]
        if form.layers
        else FORMATS[form.cases[0]].quantiser.package
        if form.cases
        else "torchao"
    )
    imports = f'importorskip("{package}', f"from {package}.integrations import"
    assert any(statement in text for statement in imports), f"{form.tests} does not import {package}"


CASES = [pytest.param(form, case, id=case) for form in formats.FORMS for case in form.cases]


@pytest.mark.parametrize(("form", "case"), CASES)
def test_what_a_row_says_is_so(form, case):
    """On a layer that the library made: LoRA class, packed bytes, merging; and both methods train."""
    stored = FORMATS[case]
    if importlib.util.find_spec(stored.quantiser.package) is None:
        pytest.skip(f"{stored.quantiser.package} is not installed")
    kind = next(layer for layer in LAYERS.values() if case in layer.formats)
    for use_dora in (False, True):
        model = get_peft_model(kind.model(stored), LoraConfig(target_modules=["body"], r=2, use_dora=use_dora))
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        assert type(layer).__name__ == formats.lora_class(form)
        weight = find_weight(layer.get_base_layer())
        assert type(weight) is form.weight
        assert form.tensor is None or type(layer.get_base_layer().weight).__name__ == form.tensor
        assert (weight.packed() is not None) == (form.norm == "packed bytes" and case not in form.by_rows)
        model(kind.input(stored)).sum().backward()
        assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
        if form.merges:
            model.merge_adapter()
            assert layer.merged
        else:
            with pytest.raises(RuntimeError, match="cannot be merged"):
                model.merge_adapter()
