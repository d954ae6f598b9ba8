# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers that Intel Neural Compressor converted to float8, in the mode that runs on a CPU (`use_qdq`). The mode for Gaudi
keeps the same tensors under another name, and is built from those."""

import warnings

import pytest
import torch
from storage import (
    Model,
    adapted,
    check_broken_adapter_is_not_merged,
    check_merging,
    check_reading,
    check_saving,
    check_training,
    check_writing,
    lora_layers,
    relative,
)
from torch import nn

from peft.tuners.lora import Linear
from peft.tuners.lora.inc import IncLoraLinear
from peft.weights import find_weight

pytest.importorskip("neural_compressor.torch.quantization", reason="needs neural-compressor-pt")
from neural_compressor.torch.quantization import FP8Config, convert, prepare

OUT, FEATURES = 48, 64
ROOM = 0.1
SCALES = ["MAXABS_ARBITRARY", "UNIT_SCALE", "ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2"]
METHODS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(params=SCALES)
def scales(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the library writes what it measured into the working directory
    warnings.filterwarnings("ignore", "To copy construct from a tensor")
    return request.param


def rows_of_input():
    return torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(5)).bfloat16()


def model(scales, converted=True):
    torch.manual_seed(0)
    made = Model(nn.Linear(FEATURES, OUT), nn.Linear(OUT, FEATURES)).bfloat16()
    made = prepare(made, FP8Config(fp8_config="E4M3", use_qdq="True", scale_method=scales))
    made(rows_of_input())
    return (convert(made) if converted else made).requires_grad_(False)


def test_reads_what_the_library_multiplies_by(scales):
    layer = model(scales).first
    weight = find_weight(layer)
    assert (weight.format, weight.shape, weight.dtype) == ("inc", (OUT, FEATURES), torch.bfloat16)
    assert not weight.direct() and not weight.differentiable and weight.packed() is None
    check_reading(weight, layer.dequant_weights(layer.weight).T)


def test_reads_the_layout_for_gaudi_built_from_the_same_tensors(scales):
    layer = model(scales).first
    expected = find_weight(layer).dense()
    scale = layer.dequant_weights.scale
    del layer.dequant_weights
    layer.scale_weight = scale
    weight = find_weight(layer)
    check_reading(weight, expected)
    check_writing(weight, ROOM)


def test_a_layer_that_is_only_measured_is_a_plain_one(scales):
    layer = model(scales, converted=False).first
    weight = find_weight(layer)
    assert not weight.lossy and weight.differentiable and torch.equal(weight.dense(), layer.weight)
    assert weight.shape == (OUT, FEATURES)


def test_writes_and_restores_every_byte(scales):
    layer = model(scales).first
    scale, before = layer.dequant_weights.scale, find_weight(layer).dense()
    kept = scale.clone() if isinstance(scale, torch.Tensor) else scale
    check_writing(find_weight(layer), ROOM)
    after = layer.dequant_weights.scale
    assert torch.equal(after, kept) if isinstance(kept, torch.Tensor) else after == kept
    find_weight(layer).write(1e4 * before.float())  # beyond what the old scales reach
    assert relative(find_weight(layer).dense(), 1e4 * before.float()) < ROOM


@METHODS
def test_trains_as_on_dense_layers(scales, dora):
    check_training(lambda: model(scales), rows_of_input(), ROOM, use_dora=dora)


@METHODS
def test_merges_and_gives_every_byte_back(scales, dora):
    check_merging(lambda: model(scales), rows_of_input(), 2 * ROOM, use_dora=dora)
    check_broken_adapter_is_not_merged(lambda: model(scales), use_dora=dora)


@METHODS
def test_saves_and_loads(scales, dora, tmp_path):
    check_saving(lambda: model(scales), rows_of_input(), str(tmp_path / "adapter"), use_dora=dora)


def test_layer_is_a_subclass_of_linear(scales):
    for layer in lora_layers(adapted(model(scales))):
        assert type(layer) is IncLoraLinear and isinstance(layer, Linear)


def test_fake_quantised_layers_are_refused_by_name(scales):
    layer = model(scales).first
    layer.qdq_weights = nn.Identity()
    with pytest.raises(TypeError, match="PatchedLinear .*use_qdq=True"):
        find_weight(layer)
