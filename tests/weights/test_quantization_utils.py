# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The public protocol of quantisation backends: which one a layer gets, and that it reads and writes the layer."""

import types

import pytest
import torch
from torch import nn

from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    ForwardOnlyQuantizationBackend,
    HqqBackend,
    QuantizationBackend,
    TorchaoBackend,
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)


class Adapter:
    def __init__(self, base_layer):
        self.base_layer = base_layer

    def get_base_layer(self):
        return self.base_layer


def bnb_layer(bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        return bnb.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
    return bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")


@pytest.mark.parametrize(("bits", "kind"), [(4, Bnb4bitBackend), (8, Bnb8bitBackend)])
def test_bnb_backends_read_and_write(bits, kind):
    layer = bnb_layer(bits)
    backend = resolve_quantization_backend(layer)
    assert type(backend) is kind and isinstance(backend, QuantizationBackend)
    assert (backend.backend_name, backend.layer_type, backend.supports_merge) == (f"bnb {bits}bit", "linear", True)
    new = torch.randn(8, 64)
    backend.set_base_weight(Adapter(layer), new)
    found = backend.get_base_weight(layer)
    assert (found - new).norm() < 0.15 * new.norm()
    assert (backend.maybe_clone_base_result(new) is new) == (bits == 8)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Embedding(3, 2), nn.Conv2d(3, 2, 1)])
def test_ordinary_layers_have_none(layer):
    assert resolve_quantization_backend(layer, loaded_in_4bit=True) is None


def _of_package(module, name):
    return type(name, (nn.Module,), {"__module__": module})()


@pytest.mark.parametrize(
    ("module", "name", "backend_name"),
    [
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "gptq"),
        ("gptqmodel.nn_modules.qlinear.gemm_awq", "AwqGEMMQuantLinear", "awq"),
        ("aqlm.inference", "QuantizedLinear", "aqlm"),
        ("eetq.modules", "EetqLinear", "eetq"),
    ],
)
def test_forward_only_formats(module, name, backend_name):
    layer = _of_package(module, name)
    backend = resolve_quantization_backend(layer)
    assert type(backend) is ForwardOnlyQuantizationBackend and not backend.supports_merge
    assert backend.backend_name == backend_name
    with pytest.raises(TypeError, match=f"{name}.*{backend_name}"):
        backend.get_base_weight(layer)
    with pytest.raises(TypeError, match=f"{name}.*{backend_name}.*merged"):
        backend.set_base_weight(Adapter(layer), torch.zeros(1))


def test_hqq():
    hqq = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    config = hqq.BaseQuantizeConfig(nbits=8, group_size=64)
    layer = hqq.HQQLinear(nn.Linear(128, 64), config, compute_dtype=torch.float32, device="cpu")
    backend, bias = resolve_quantization_backend(layer), layer.bias
    assert type(backend) is HqqBackend and backend.supports_merge
    new = 2 * backend.get_base_weight(layer)
    backend.set_base_weight(Adapter(layer), new)
    torch.testing.assert_close(backend.get_base_weight(layer), new, rtol=0, atol=1e-2)
    assert layer.bias is bias and layer(torch.randn(2, 128)).shape == (2, 64)


@pytest.mark.parametrize("configured", [True, False])
def test_torchao(configured):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    kwargs = {"get_apply_tensor_subclass": quantization.Int8WeightOnlyConfig} if configured else {}
    backend = resolve_quantization_backend(layer, **kwargs)
    assert type(backend) is TorchaoBackend
    new = 2 * backend.get_base_weight(layer)
    backend.set_base_weight(Adapter(layer), new)
    torch.testing.assert_close(backend.get_base_weight(layer), new, rtol=0, atol=1e-2)
    assert type(layer.weight).__module__.startswith("torchao")


def test_quantization_kwargs():
    model = nn.Linear(2, 2)
    assert get_quantization_kwargs(model) == {}
    model.hf_quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace())
    assert get_quantization_kwargs(model) == {}
    make = object()
    model.hf_quantizer.quantization_config.get_apply_tensor_subclass = make
    assert get_quantization_kwargs(model) == {"get_apply_tensor_subclass": make}


def test_extra_repr():
    layer = nn.Linear(2, 2)
    assert quantization_extra_repr(layer) == ""
    layer.quantization_backend = Bnb4bitBackend()
    assert quantization_extra_repr(layer) == "quantization_backend='bnb 4bit'"
