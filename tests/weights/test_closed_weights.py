# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers of gptqmodel that rearrange their weight for a kernel: stand-ins with the names and attributes that gptqmodel
gives its layers, since those kernels run on GPUs alone."""

import pytest
import torch
from makers import BaseQuantLinear, named
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.weights import find_weight


def matrix_of(layer):
    return layer.qweight.view(torch.float16).T


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_read_through_its_products(bias):
    layer = named("MarlinLinear")(bias=bias)
    weight, before = find_weight(layer), layer.bias
    assert (weight.format, weight.shape, weight.dtype) == ("gptqmodel", (12, 8), torch.float16)
    assert torch.equal(weight.dense(), matrix_of(layer)) and torch.equal(weight.rows(3, 7), matrix_of(layer)[3:7])
    assert layer.bias is before and weight.lossy and not weight.direct() and weight.packed() is None
    key = weight.key()
    assert weight.key() == key
    layer.qweight.add_(0)
    assert weight.key() != key


def test_what_gptqmodel_declares_about_gradients():
    assert find_weight(named("MarlinLinear")()).differentiable
    assert not find_weight(named("MarlinLinear", SUPPORTS_TRAINING=False)()).differentiable


@pytest.mark.parametrize(("name", "kind"), [("MarlinLinear", GPTQLoraLinear), ("AwqMarlinLinear", AwqLoraLinear)])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_beside_it_and_refuse_to_merge(name, kind, dora):
    layer = named(name)()
    config = LoraConfig(target_modules=["body"], r=2, use_dora=dora, init_lora_weights=False)
    tuned = get_peft_model(nn.ModuleDict({"body": layer}), config).base_model.model["body"]
    assert type(tuned) is kind
    x = torch.randn(3, 8, requires_grad=True)
    y = tuned(x)
    a, b = tuned.lora_A["default"].weight, tuned.lora_B["default"].weight
    W = matrix_of(layer).float() + tuned.scaling["default"] * b @ a
    if dora:
        W = W * (tuned.lora_magnitude_vector["default"].weight / W.norm(dim=1))[:, None]
    torch.testing.assert_close(y, x @ W.T + layer.bias.float(), rtol=1e-4, atol=1e-3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)
    before = [buffer.clone() for buffer in layer.buffers()]
    with pytest.raises((TypeError, RuntimeError), match=f'{name} keeps .*backend="gptq_torch"'):
        tuned.merge()
    assert not tuned.merged and all(map(torch.equal, layer.buffers(), before))


def test_a_layer_that_rounds_its_input_computes_but_is_not_read():
    layer = named("TorchInt8Linear")()
    with pytest.raises(TypeError, match="TorchInt8Linear cannot be read"):
        find_weight(layer).dense()
    tuned = get_peft_model(nn.ModuleDict({"body": layer}), LoraConfig(target_modules=["body"]))
    x = torch.randn(2, 8)
    assert torch.equal(tuned.base_model.model["body"](x), layer(x))
    with pytest.raises(TypeError, match="another backend"):
        get_peft_model(
            nn.ModuleDict({"body": named("QQQLinear")()}), LoraConfig(target_modules=["body"], use_dora=True)
        )


def test_a_rotating_layer_is_not_read_as_the_one_that_it_derives_from():
    torch_awq = type("AwqTorchLinear", (BaseQuantLinear,), {"__module__": "gptqmodel.nn_modules.qlinear.torch_awq"})
    paro = type("ParoLinear", (torch_awq,), {"__module__": "gptqmodel.nn_modules.qlinear.paroquant"})
    assert find_weight(paro()).format == "gptqmodel" and find_weight(torch_awq()).format == "awq"
