# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers that compressed-tensors quantised: packed, unpacked by the model's first forward pass, or rounded in each one."""

import copy

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

from peft.weights import find_weight

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
from compressed_layers import by_preset, calibrate, quantised
from compressed_tensors.compressors import ModelCompressor, compress_module, decompress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

OUT, FEATURES = 256, 128
METHODS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
MODES = pytest.mark.parametrize("mode", ["compressed", "plain", "rounded"])
# Presets of the library, and the relative error that rounding by them may make.
PRESETS = {
    "W4A16": 0.15, "W4A16_ASYM": 0.15, "W3A16": 0.3, "W8A16": 0.02, "W8A8": 0.03, "W4A8": 0.2, "FP8": 0.08,
    "FP8_DYNAMIC": 0.08, "NVFP4A16": 0.2, "MXFP4A16": 0.25, "MXFP6A16": 0.06, "MXFP8A16": 0.06,
}  # fmt: skip
ROUNDS_INPUT = {"W8A8", "W4A8", "FP8", "FP8_DYNAMIC"}


def _custom(**weights):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


CUSTOM = {
    "groups": (lambda: _custom(num_bits=4, strategy="group", group_size=32, symmetric=False), 0.15),
    "blocks": (lambda: _custom(num_bits=8, type="float", strategy="block", block_structure=[40, 48]), 0.08),
}


@pytest.fixture(params=[*PRESETS, *CUSTOM])
def scheme(request):
    """(name, what makes the scheme, room)"""
    name = request.param
    if name in CUSTOM:
        return name, *CUSTOM[name]
    return name, lambda: by_preset(name), PRESETS[name]


def own_dtype(scheme):
    """The dtype that the library unpacks to: its floating formats of less than a byte a group know bfloat16 alone."""
    return torch.bfloat16 if scheme[0].startswith(("NV", "MX")) else torch.float32


def linear(scheme, mode, dtype=None):
    dtype = dtype or own_dtype(scheme)
    torch.manual_seed(0)
    return quantised(nn.Sequential(nn.Linear(FEATURES, OUT, dtype=dtype)), scheme[1](), mode)[0]


def model(scheme, mode):
    dtype = own_dtype(scheme)
    torch.manual_seed(0)
    made = Model(nn.Linear(FEATURES, OUT, dtype=dtype), nn.Linear(OUT, FEATURES, dtype=dtype))
    return quantised(made, scheme[1](), mode)


def rows_of_input(scheme):
    return torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(5)).to(own_dtype(scheme))


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_what_the_library_unpacks(scheme, mode, dtype):
    layer = linear(scheme, mode, dtype)
    twin = copy.deepcopy(layer)
    if mode == "rounded":
        compress_module(twin)
    if mode != "plain":
        decompress_module(twin)
    weight = find_weight(layer)
    assert (weight.format, weight.mode, weight.packed(), weight.direct()) == ("compressed-tensors", mode, None, False)
    if mode == "plain":
        assert not weight.lossy and torch.equal(weight.dense(), twin.weight)
        assert torch.equal(weight.rows(3, 7), twin.weight[3:7])
    elif twin.weight.dtype == weight.dtype:
        check_reading(weight, twin.weight)
    else:  # the library unpacks NVFP4 in bfloat16, and rounds in the weight's own dtype
        assert relative(weight.dense(), twin.weight) < 0.01


@MODES
def test_a_forward_pass_changes_no_key(scheme, mode):
    if mode == "compressed":
        pytest.skip("a packed layer does not run")
    layer = linear(scheme, mode)
    key = find_weight(layer).key()
    layer(rows_of_input(scheme))
    assert find_weight(layer).key() == key


@pytest.mark.parametrize("mode", ["compressed", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_and_restores_every_byte(scheme, mode, dtype):
    layer = linear(scheme, mode, dtype)
    names = dict(layer.named_parameters())
    check_writing(find_weight(layer), scheme[2])
    assert {name: id(value) for name, value in layer.named_parameters()} == {k: id(v) for k, v in names.items()}


@MODES
def test_writes_what_the_library_rounds(scheme, mode):
    """Calibrating the new matrix anew and packing it gives the same."""
    layer, other = linear(scheme, mode), linear(scheme, "rounded")
    matrix = torch.randn(OUT, FEATURES)
    other.weight.data.copy_(matrix)
    calibrate(other)
    find_weight(layer).write(matrix)
    expected = matrix if mode == "plain" else find_weight(other).dense()
    assert relative(find_weight(layer).dense(), expected) < 0.05  # a scale may round to the other side of a tie


@METHODS
@pytest.mark.parametrize("mode", ["plain", "rounded"])
def test_trains_as_on_dense_layers(scheme, mode, dora):
    """Also where the library rounds the activations, which hides the input from autograd."""
    room = 0.3 if scheme[0] in ROUNDS_INPUT else 0.02
    check_training(lambda: model(scheme, mode), rows_of_input(scheme), room, use_dora=dora)


@METHODS
@pytest.mark.parametrize("mode", ["plain", "rounded"])
def test_merges_and_gives_every_byte_back(scheme, mode, dora):
    room = 3 * scheme[2] + 0.02
    check_merging(lambda: model(scheme, mode), rows_of_input(scheme), room, exact=mode == "rounded", use_dora=dora)
    check_broken_adapter_is_not_merged(lambda: model(scheme, mode), use_dora=dora)


@METHODS
def test_saves_and_loads(scheme, dora, tmp_path):
    check_saving(lambda: model(scheme, "plain"), rows_of_input(scheme), str(tmp_path), use_dora=dora)


@METHODS
def test_adapters_on_a_packed_model_live_through_its_first_forward(scheme, dora):
    """The magnitude starts from the packed bytes; the first forward pass unpacks the layers under the adapters."""
    packed = model(scheme, "rounded")
    compressor = ModelCompressor.from_pretrained_model(packed)
    compressor.compress_model(packed)
    tuned = adapted(packed, use_dora=dora).eval()
    assert [find_weight(layer.get_base_layer()).mode for layer in lora_layers(tuned)] == ["compressed"] * 2
    reference = adapted(model(scheme, "plain"), use_dora=dora).eval()
    x = rows_of_input(scheme)
    with torch.no_grad():
        expected = reference(x)
        before = [find_weight(layer.get_base_layer()).dense() for layer in lora_layers(tuned)]
        tuned.merge_adapter(safe_merge=True)  # into the packed bytes
        merged = tuned(x)
        assert relative(merged, expected) < 3 * scheme[2] + 0.02
        assert [find_weight(layer.get_base_layer()).mode for layer in lora_layers(tuned)] == ["plain"] * 2
        tuned.unmerge_adapter()
        for layer, matrix in zip(lora_layers(tuned), before, strict=True):
            assert torch.equal(find_weight(layer.get_base_layer()).dense(), matrix.to(layer.weight.dtype))
        assert relative(tuned(x), expected) < 0.02


def test_packing_a_merged_model_cannot_be_undone():
    scheme = ("W4A16", lambda: by_preset("W4A16"), 0.15)
    layer = linear(scheme, "plain")
    snapshot = find_weight(layer).snapshot()
    compress_module(layer)
    with pytest.raises(RuntimeError, match="decompress the model"):
        find_weight(layer).restore(snapshot)
