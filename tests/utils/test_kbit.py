# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Preparing quantised models for training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import llama

from peft.utils import other
from peft.utils.other import cast_mixed_precision_params, prepare_model_for_kbit_training


def _prepared(flag: str | None = None, method: str | None = None, **kwargs):
    model = llama(dtype=torch.bfloat16)
    if flag:
        setattr(model, flag, True)
    if method:
        model.quantization_method = method
    return prepare_model_for_kbit_training(model, **kwargs)


@pytest.mark.parametrize(
    ("flag", "method", "dtype", "checkpointed"),
    [
        (None, None, torch.float32, False),
        ("is_loaded_in_4bit", None, torch.float32, True),
        ("is_loaded_in_8bit", "bitsandbytes", torch.float32, True),
        (None, "gptq", torch.bfloat16, True),
        (None, "torchao", torch.bfloat16, True),
        (None, "awq", torch.float32, False),
    ],
)
def test_dtype_and_checkpointing(flag, method, dtype, checkpointed):
    model = _prepared(flag, method)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing is checkpointed


def test_gradients_flow_through_reentrant_checkpoints():
    model = _prepared("is_loaded_in_4bit", gradient_checkpointing_kwargs={"use_reentrant": True}).train()
    head = model.lm_head.weight.requires_grad_(True)
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert head.grad is not None
    assert norm.grad is not None


def test_checkpointing_can_be_left_off():
    assert not _prepared("is_loaded_in_4bit", use_gradient_checkpointing=False).is_gradient_checkpointing


def test_model_without_checkpointing_arguments():
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.is_loaded_in_8bit = True
            self.enabled = False

        def get_input_embeddings(self):
            return self.layer

        def gradient_checkpointing_enable(self):
            self.enabled = True

    model = prepare_model_for_kbit_training(Old())
    assert model.enabled
    assert model.layer(torch.ones(1, 2)).requires_grad
    with pytest.warns(UserWarning, match="use_reentrant"):
        prepare_model_for_kbit_training(Old(), gradient_checkpointing_kwargs={"use_reentrant": False})


def test_packed_parameters_are_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    model = nn.Sequential(layer, nn.LayerNorm(64).half())
    prepare_model_for_kbit_training(model)
    assert layer.weight.dtype == torch.bfloat16
    assert model[1].weight.dtype == torch.float32


def test_cast_mixed_precision():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    model[0].requires_grad_(False)
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    cast_mixed_precision_params(model, torch.float16)
    assert model[0].weight.dtype == torch.float16
    assert model[1].weight.dtype == torch.float32
    assert model.codes.dtype == torch.int8


def test_quantization_config():
    model = nn.Linear(2, 2)
    assert other.get_quantization_config(model, "gptq") is None
    model.quantization_method, model.config = "gptq", SimpleNamespace(quantization_config="it")
    assert other.get_quantization_config(model, "gptq") == "it"
    assert other.get_quantization_config(model, "awq") is None


def test_gptqmodel_layers_are_told_by_name():
    base = type("BaseQuantLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear"})
    awq = type("AwqTorchQuantLinear", (base,), {"__module__": "gptqmodel.nn_modules.qlinear.torch_awq"})
    stranger = type("BaseQuantLinear", (nn.Module,), {"__module__": "elsewhere"})
    assert other.is_gptqmodel_quant_linear(base())
    assert not other.is_gptqmodel_awq_layer(base())
    assert other.is_gptqmodel_quant_linear(awq())
    assert other.is_gptqmodel_awq_layer(awq())
    assert not other.is_gptqmodel_quant_linear(stranger())


def test_no_gptqmodel_no_class(monkeypatch):
    assert other.get_gptqmodel_quant_linear(None) is None
    monkeypatch.setattr("peft.utils.other.kbit.is_gptqmodel_available", lambda: False)
    assert other.get_gptqmodel_quant_linear(SimpleNamespace(bits=4)) is None
