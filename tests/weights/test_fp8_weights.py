# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""transformers' float8 linear layers. `CompressedTensorsFP8Linear` runs on a CPU as it is. The kernel of `FP8Linear` comes
from a hub and needs a GPU: where its tests run the layer, a PyTorch body that rounds activations alike takes its place."""

import pytest
import torch
from makers import blocked, fbgemm, pytorch_body, rowwise
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
from transformers.integrations import finegrained_fp8 as by_block

from peft.tuners.lora import Linear
from peft.weights import find_weight

OUT, FEATURES = 96, 128
ROOM = 0.08
METHODS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def without_the_hub(monkeypatch):
    monkeypatch.setattr(by_block, "fp8_linear", pytorch_body)


KINDS = {
    "FP8Linear by block": blocked(),
    "FP8Linear by block, ends within blocks": blocked((40, 48)),
    "FP8Linear by block, powers of two": blocked(scale_fmt="ue8m0"),
    "FP8Linear by tensor": blocked(None),
    "CompressedTensorsFP8Linear": rowwise,
}


def linear(make, out=OUT, features=FEATURES, seed=0):
    torch.manual_seed(seed)
    return make(out, features, torch.randn(out, features) / features**0.5, torch.randn(out)).requires_grad_(False)


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def model(make):
    return Model(linear(make), linear(make, FEATURES, OUT, seed=1))


def rows_of_input(dtype=torch.float32):
    return torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(5)).to(dtype)


def own_matrix(layer):
    """The matrix by transformers alone."""
    if isinstance(layer, by_block.FP8Linear):
        return by_block._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, layer.block_size, torch.float32)
    return layer.weight.float() * layer.weight_scale.reshape(-1, 1)


def test_reads_what_transformers_reads(make):
    layer = linear(make)
    weight = find_weight(layer)
    assert (weight.format, weight.shape, weight.dtype, weight.packed()) == (
        "float8",
        (OUT, FEATURES),
        torch.float32,
        None,
    )
    assert not weight.direct() and not weight.differentiable
    check_reading(weight, own_matrix(layer))
    unit = torch.eye(FEATURES)
    assert relative((layer(unit) - layer.bias).T, weight.dense()) < 0.03


def test_reads_fbgemms_layout():
    layer = linear(fbgemm)
    check_reading(find_weight(layer), own_matrix(layer))
    check_writing(find_weight(layer), ROOM)


def test_writes_and_restores_every_byte(make):
    layer = linear(make)
    parameters = list(layer.parameters())
    check_writing(find_weight(layer), ROOM)
    assert all(ours is theirs for ours, theirs in zip(layer.parameters(), parameters, strict=True))


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_writes_as_transformers_quantises(scale_fmt):
    class Config:
        weight_block_size = (32, 64)

    Config.scale_fmt = scale_fmt
    operation = by_block.Fp8Quantize(type("Quantiser", (), {"quantization_config": Config})())
    matrix = torch.randn(OUT, FEATURES)
    matrix[:32, :64] = 0
    expected = operation.convert({"a.weight": matrix})
    layer = linear(blocked(scale_fmt=scale_fmt))
    find_weight(layer).write(matrix)
    torch.testing.assert_close(
        layer.weight_scale_inv.float(), expected["a.weight_scale_inv"].float(), rtol=3e-7, atol=0
    )
    assert relative(find_weight(layer).dense(), matrix) < 0.04
    differ = layer.weight.float() != expected["a.weight"].float()
    assert differ.float().mean() < 1e-3  # the same, but where two ways of dividing end on two sides of a tie


def test_a_layer_that_was_loaded_dense_is_a_plain_one():
    layer = linear(blocked())
    layer.weight = nn.Parameter(torch.randn(OUT, FEATURES, dtype=torch.bfloat16), requires_grad=False)
    weight = find_weight(layer)
    assert weight.dtype == torch.bfloat16 and not weight.lossy and weight.differentiable
    assert torch.equal(weight.dense(), layer.weight)
    snapshot = weight.snapshot()
    weight.write(torch.zeros(OUT, FEATURES))
    assert not layer.weight.any()
    weight.restore(snapshot)
    assert torch.equal(weight.dense(), snapshot)


def test_packed_fp4_and_grouped_layers_are_refused_by_name():
    layer = linear(blocked())
    layer.weight = nn.Parameter(torch.zeros(OUT, FEATURES // 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="FP4.*dequantize=True"):
        find_weight(layer)
    with pytest.raises(TypeError, match="FP8GroupedLinear.*group"):
        find_weight(by_block.FP8GroupedLinear(FEATURES, OUT, 2, (32, 64)))


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_as_on_dense_layers(make, dora, dtype):
    check_training(lambda: model(make), rows_of_input(dtype), ROOM, use_dora=dora)


def test_adapters_are_not_made_in_float8(make):
    for layer in lora_layers(adapted(model(make), use_dora=True)):
        assert type(layer) is Linear
        assert {parameter.dtype for name, parameter in layer.named_parameters() if "lora_" in name} == {torch.float32}


@METHODS
def test_merges_and_gives_every_byte_back(make, dora):
    check_merging(lambda: model(make), rows_of_input(), ROOM, use_dora=dora)
    check_merging(lambda: model(make), rows_of_input(), ROOM, "one", "two", use_dora=dora)
    check_broken_adapter_is_not_merged(lambda: model(make), use_dora=dora)


@METHODS
def test_saves_and_loads(make, dora, tmp_path):
    check_saving(lambda: model(make), rows_of_input(), str(tmp_path), use_dora=dora)
