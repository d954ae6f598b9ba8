# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""How the storage format of a layer is told, and what is said about layers that cannot be read."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from peft.weights import find_weight
from peft.weights.plain import PlainWeight


def test_no_quantiser_is_imported_for_plain_layers():
    # transformers' model classes import triton, so only what reading a weight adds can be held against it.
    code = (
        "import sys, torch; from peft.weights import find_weight; before = set(sys.modules); "
        "find_weight(torch.nn.Linear(2, 2)).dense(); find_weight(torch.nn.Embedding(2, 2)).dense(); "
        "assert not {'bitsandbytes', 'torchao', 'hqq'} & set(sys.modules); "
        "assert 'triton' not in set(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_module_with_a_floating_weight_is_plain():
    layer = nn.Bilinear(2, 3, 4)
    weight = find_weight(layer)
    assert isinstance(weight, PlainWeight) and weight.shape == (4, 6)
    assert torch.equal(weight.dense(), layer.weight.flatten(1))


def test_fan_in_fan_out_is_for_linear_layers():
    assert find_weight(nn.Linear(3, 2), fan_in_fan_out=True).shape == (3, 2)
    assert find_weight(nn.Bilinear(2, 3, 4), fan_in_fan_out=True).shape == (6, 4)
    assert find_weight(nn.Conv2d(3, 2, 1), fan_in_fan_out=True).shape == (2, 3)
    assert find_weight(nn.Embedding(3, 2), fan_in_fan_out=True).shape == (2, 3)


class QuantLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


def _with_weight(weight):
    layer = nn.Module()
    layer.weight = weight
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (QuantLinear(), "QuantLinear has no `weight` tensor .*qweight"),
        (nn.ReLU(), "ReLU has no `weight`"),
        (nn.LayerNorm(3), r"LayerNorm.* shape \(3,\)"),
        (nn.ConvTranspose2d(2, 3, 1), "ConvTranspose2d: .*transposed convolution"),
        (_with_weight(torch.zeros(2, 2, dtype=torch.uint8)), "torch.uint8"),
        (_with_weight(torch.zeros(2, 2).to(torch.float8_e4m3fn)), "float8"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_read_is_named(layer, message):
    with pytest.raises(TypeError, match=message):
        find_weight(layer)
