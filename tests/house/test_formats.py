# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A storage format is one file: it is known by being in its folder, and the documentation's table is made of what the files
register. What the table says is tried on layers in tests/weights/test_every_format.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft.weights import FORMATS, Format, formats, register, torchao

ROOT = Path(__file__).resolve().parents[2]
TABLE = str(ROOT / "docs" / "formats.py")


def python(*arguments: str, source: Path = ROOT / "src") -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_says_what_the_code_says():
    python(TABLE, "--check")


def test_each_class_of_torchao_that_is_written_has_its_row():
    assert {form.tensor for form in FORMATS if form.tensor} == set(torchao._REQUANTISE)


THE_FORMAT = """
import torch

from .formats import Format, register
from .stored import StoredWeight


class SignWeight(StoredWeight):
    format = "signs"

    @property
    def shape(self):
        return tuple(self.layer.signs.shape)

    @property
    def dtype(self):
        return self.layer.scale.dtype

    @property
    def device(self):
        return self.layer.signs.device

    @property
    def trainable(self):
        return False

    def _read(self, a, b):
        return self.layer.signs[a:b].to(self.dtype) * self.layer.scale

    def write(self, matrix):
        self._check_matrix(matrix)
        self._put({"signs": torch.sign(matrix).to(torch.int8), "scale": matrix.abs().mean().to(self.dtype)})

    def tensors(self):
        return {"signs": self.layer.signs, "scale": self.layer.scale}

    def direct(self):
        return True


register(Format("Signs", SignWeight, ("signs.SignLinear",), verified="CPU", remark="made up"))
"""
THE_LIBRARY = """
import torch


class SignLinear(torch.nn.Module):
    def __init__(self, out, features):
        super().__init__()
        self.in_features, self.out_features, self.bias = features, out, None
        self.register_buffer("signs", torch.randn(out, features).sign().to(torch.int8))
        self.register_buffer("scale", torch.tensor(0.25))

    def forward(self, x):
        return x @ (self.signs.to(x.dtype) * self.scale).T
"""
ITS_USE = """
import sys

import peft
from peft.weights import find_weight

assert "signs" not in sys.modules
import torch
from signs import SignLinear

torch.manual_seed(0)
for use_dora in (False, True):
    base = torch.nn.Sequential(SignLinear(6, 4), torch.nn.Tanh(), SignLinear(5, 6))
    first, x = base[0], torch.randn(3, 4)
    before = first.signs.clone()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", r=2, use_dora=use_dora))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert [type(find_weight(layer.get_base_layer())).__name__ for layer in layers] == ["SignWeight"] * 2
    torch.nn.init.normal_(layers[0].lora_B["default"].weight)
    model(x).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(first.signs, before)
    model.unmerge_adapter()
    assert torch.equal(first.signs, before)
"""


def test_a_format_is_one_file(tmp_path):
    """Added to a copy of the package, it is found, adapted, trained, merged and in the table."""
    shutil.copytree(ROOT / "src" / "peft", tmp_path / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "peft" / "weights" / "signs.py").write_text(THE_FORMAT, "utf-8")
    (tmp_path / "signs.py").write_text(THE_LIBRARY, "utf-8")
    python("-c", ITS_USE, source=tmp_path)
    assert "| Signs | `Linear` | rows | rounded anew | CPU | made up |" in python(TABLE, source=tmp_path)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("another", ("hqq.core.quantize.HQQLinear",), "hqq.core.quantize.HQQLinear is known already"),
        ("HQQ", ("a.b.C",), "a format of this name is known already"),
        ("another", (), "give `layers` or `tells`"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(name, layers, message):
    before = list(FORMATS), dict(formats._by_layer)
    with pytest.raises(ValueError, match=message):
        register(Format(name, torchao.TorchaoWeight, layers))
    assert before == (FORMATS, formats._by_layer)
