# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""HQQ's weights: every packing read as hqq reads it, written by hqq itself, and restored bit for bit."""

import itertools

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.hqq import HqqLoraLinear
from peft.weights import find_weight

quantize = pytest.importorskip("hqq.core.quantize")
BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def hqq_linear(out=96, features=64, *, nbits=4, group_size=16, axis=1, view_as_float=False, dtype=torch.float16):
    torch.manual_seed(0)
    config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis, view_as_float=view_as_float)
    linear = nn.Linear(features, out).requires_grad_(False)
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def bits_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def stored(layer):
    return [bits_of(tensor) for tensor in (layer.W_q, layer.meta["scale"], layer.meta["zero"])]


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (64, 24)])  # of the second, groups cross rows
@pytest.mark.parametrize("group_size", [8, 64, None])
def test_reads_writes_and_restores_every_packing(nbits, axis, view_as_float, shape, group_size):
    layer = hqq_linear(*shape, nbits=nbits, group_size=group_size, axis=axis, view_as_float=view_as_float)
    weight = find_weight(layer)
    assert (weight.format, weight.shape, weight.dtype, weight.lossy) == ("hqq", shape, torch.float16, True)
    dense, before, key = layer.dequantize(), stored(layer), weight.key()
    assert torch.equal(weight.dense(), dense)
    assert torch.equal(weight.dense(torch.float64), dense.double())
    for a, b in ((0, 1), (5, 11), (7, 7), (3, shape[0])):
        assert torch.equal(weight.rows(a, b), dense[a:b])
    assert weight.key() == key == find_weight(layer).key()

    snapshot, new = weight.snapshot(), torch.randn(shape)
    fresh = nn.Linear(*shape[::-1], bias=False)
    fresh.weight.data = new.clone()
    config = {**layer.quant_config, "offload_meta": False}
    expected = quantize.HQQLinear(fresh, config, compute_dtype=torch.float16, device="cpu")
    for _ in range(2):
        parameter = layer.W_q
        weight.write(new)
        assert weight.key() != key and layer.W_q is parameter
        assert torch.equal(layer.dequantize(), expected.dequantize())
        weight.restore(snapshot)
        assert all(map(torch.equal, stored(layer), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_as_hqq_does(dtype):
    layer = hqq_linear(nbits=8, dtype=dtype)
    assert find_weight(layer).dense().dtype == dtype
    assert torch.equal(find_weight(layer).dense(), layer.dequantize())


def test_rows_build_no_more_than_they_need(monkeypatch):
    weight = find_weight(hqq_linear(96, 64))
    sizes = []
    real = type(weight)._codes

    def spy(self, *args):
        for lo, hi, codes in real(self, *args):
            sizes.append(codes.numel())
            yield lo, hi, codes

    monkeypatch.setattr(type(weight), "_codes", spy)
    weight.rows(10, 13)
    assert sizes == [3 * 64]


def test_unpacked_integers():
    layer = hqq_linear()
    torch.manual_seed(0)
    params = {**layer.quant_config["weight_quant_params"], "bitpack": False}
    config = {**layer.quant_config, "weight_quant_params": params, "offload_meta": False}
    unpacked = quantize.HQQLinear(nn.Linear(64, 96), config, compute_dtype=torch.float16, device="cpu")
    assert unpacked.meta["packing"] is None
    weight = find_weight(unpacked)
    assert torch.equal(weight.dense(), unpacked.dequantize()) and torch.equal(weight.dense(), layer.dequantize())
    weight.write(torch.randn(96, 64))
    assert unpacked.meta["packing"] is None and torch.equal(weight.dense(), unpacked.dequantize())


def test_scales_kept_together():
    """With `offload_meta`, which pins memory and so needs a GPU, HQQ stacks zero and scale; here by hand."""
    layer = hqq_linear()
    dense, meta = layer.dequantize(), layer.meta
    meta["zero_scale"] = torch.stack((meta.pop("zero"), meta.pop("scale")))
    weight = find_weight(layer)
    assert torch.equal(weight.dense(), dense)
    snapshot = weight.snapshot()
    weight.write(torch.randn(96, 64))
    assert torch.equal(weight.dense(), layer.dequantize()) and not torch.equal(weight.dense(), dense)
    weight.restore(snapshot)
    assert torch.equal(layer.dequantize(), dense)


def test_quantised_scales_are_refused_by_name():
    layer = hqq_linear()
    layer.meta["quant_zero"] = True
    with pytest.raises(TypeError, match="quant_zero=True"):
        find_weight(layer).dense()


def test_write_refuses_what_does_not_fit():
    layer = hqq_linear()
    before = stored(layer)
    for wrong in (torch.randn(64, 96), torch.ones(96, 64, dtype=torch.int32)):
        with pytest.raises(ValueError, match="hqq HQQLinear"):
            find_weight(layer).write(wrong)
    assert all(map(torch.equal, stored(layer), before))


def test_key_tells_changes():
    layer = hqq_linear()
    weight = find_weight(layer)
    keys = [weight.key()]
    layer.meta["scale"].mul_(2)
    keys.append(weight.key())
    layer.meta["zero"] = layer.meta["zero"] + 1
    keys.append(weight.key())
    layer.W_q.data = layer.W_q.data.clone()
    keys.append(weight.key())
    assert all(a != b for a, b in itertools.combinations(keys, 2))
    assert [weight.has_key(key) for key in keys] == [False] * (len(keys) - 1) + [True]


def test_direct():
    layer = hqq_linear(dtype=torch.float32)
    weight, x = find_weight(layer), torch.randn(3, 64)
    assert weight.direct()
    torch.testing.assert_close(nn.functional.linear(x, weight.dense(), weight.bias), layer(x), rtol=1e-5, atol=1e-5)
    layer.register_forward_hook(lambda *args: None)
    assert not weight.direct()
    mine = hqq_linear()
    mine.__class__ = type("Mine", (quantize.HQQLinear,), {})
    assert find_weight(mine).format == "hqq" and not find_weight(mine).direct()


def test_a_forward_pass_that_is_no_product_of_the_weight_is_not_direct(monkeypatch):
    weight = find_weight(hqq_linear())
    monkeypatch.setattr(quantize.HQQLinear, "forward", quantize.HQQLinear.forward_aten_int8)
    assert not weight.direct()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_bias_of_a_layer_that_was_not_frozen_is_not_trained(dropout):
    linear = nn.Linear(64, 96)
    original = linear.bias
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    layer = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    tuned = get_peft_model(nn.ModuleDict({"body": layer}), LoraConfig(target_modules=["body"], lora_dropout=dropout))
    x = torch.randn(2, 3, 64, requires_grad=True)
    tuned.base_model.model["body"](x).sum().backward()
    assert x.grad is not None and original.grad is None and not layer.bias.requires_grad
    assert torch.equal(layer.bias, original)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_made_where_and_as_the_layer_computes(dora):
    model = nn.ModuleDict({"body": hqq_linear(dtype=torch.bfloat16)})
    config = LoraConfig(target_modules=["body"], r=4, use_dora=dora)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = tuned.base_model.model["body"]
    assert type(layer) is HqqLoraLinear and layer.weight is layer.get_base_layer().W_q
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    if dora:
        norm = layer.get_base_layer().dequantize().float().norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.float(), norm, rtol=1e-2, atol=0)
