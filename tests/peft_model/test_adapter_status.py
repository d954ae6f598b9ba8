# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Status of layers and models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import adapted, llama, lora
from torch import nn

from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.peft_model import TunerLayerStatus, TunerModelStatus


def test_fields():
    assert [field.name for field in dataclasses.fields(TunerLayerStatus)] == [
        "name",
        "module_type",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "available_adapters",
        "devices",
        "quantization_backend",
    ]
    assert [field.name for field in dataclasses.fields(TunerModelStatus)] == [
        "base_model_type",
        "adapter_model_type",
        "peft_types",
        "trainable_params",
        "total_params",
        "num_adapter_layers",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "available_adapters",
        "devices",
        "quantization_backend",
    ]


def test_one_adapter():
    model = adapted()
    layers = model.get_layer_status()
    assert len(layers) == 4
    assert layers[0] == TunerLayerStatus(
        name="model.model.layers.0.self_attn.q_proj",
        module_type="lora.Linear",
        enabled=True,
        active_adapters=["default"],
        merged_adapters=[],
        requires_grad={"default": True},
        available_adapters=["default"],
        devices={"default": ["cpu"]},
        quantization_backend=None,
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert model.get_model_status() == TunerModelStatus(
        base_model_type="LlamaForCausalLM",
        adapter_model_type="LoraModel",
        peft_types={"default": "LORA"},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=4,
        enabled=True,
        active_adapters=["default"],
        merged_adapters=[],
        requires_grad={"default": True},
        available_adapters=["default"],
        devices={"default": ["cpu"]},
        quantization_backend=None,
    )


def test_modules_to_save_count_as_layers():
    layers = adapted(modules_to_save=["lm_head"]).get_layer_status()
    (head,) = [layer for layer in layers if layer.name == "model.lm_head"]
    assert head.module_type == "ModulesToSaveWrapper" and head.requires_grad == {"default": True}


def test_states_of_several_adapters():
    model = adapted()
    model.add_adapter("second", lora())
    status = model.get_model_status()
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "second": False}
    model.set_adapter("second")
    model.merge_adapter()
    status = model.get_model_status()
    assert status.merged_adapters == ["second"] and status.requires_grad == {"default": False, "second": True}
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_disagreement_is_irregular():
    model = adapted()
    model.add_adapter("second", lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_adapter("second")
    status = model.get_model_status()
    assert status.active_adapters == "irregular" and status.enabled is True
    assert status.requires_grad == {"default": "irregular", "second": "irregular"}
    layer.merge()
    layer.enable_adapters(False)
    status = model.get_model_status()
    assert status.enabled == "irregular" and status.merged_adapters == "irregular"
    layer.lora_A["second"].weight.requires_grad_(True)
    assert model.get_layer_status()[0].requires_grad["second"] == "irregular"


def test_without_a_peft_model():
    base = llama()
    inject_adapter_in_model(lora(), base)
    status = get_model_status(base)
    assert status.adapter_model_type == "None" and status.peft_types == {"default": "LORA"}
    assert get_layer_status(base)[0].name == "model.layers.0.self_attn.q_proj"
    assert get_model_status(adapted().base_model).adapter_model_type == "LoraModel"


@pytest.mark.parametrize("function", [get_layer_status, get_model_status])
def test_a_model_without_adapters_has_no_status(function):
    with pytest.raises(ValueError, match="no adapted layer"):
        function(llama())


def test_meta_devices_show():
    model = get_peft_model(llama(), lora(), low_cpu_mem_usage=True)
    assert model.get_model_status().devices == {"default": ["meta"]}


def test_packed_weights_count_in_full():
    bnb = pytest.importorskip("bitsandbytes")

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            self.is_loaded_in_4bit = True

    model = get_peft_model(Base().to("cpu"), LoraConfig(r=2, target_modules=["body"]))
    assert model.get_nb_trainable_parameters() == (256, 64 * 64 + 256)
    assert model.get_layer_status()[0].module_type == "lora.Linear4bit"
