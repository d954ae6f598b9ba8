# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters on base models that accelerate keeps on the CPU or on disk and brings in layer by layer."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import IDS, llama, logits, lora

from peft import PeftModel, PeftWarning, get_peft_model

DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture
def offloaded(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=DEVICE_MAP, offload_folder=tmp_path / "offload"
    ).eval()
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    return model


CASES = {
    "lora": {},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(params=CASES)
def saved(request, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(llama(), lora(**CASES[request.param])).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_loading_onto_an_offloaded_model(offloaded, saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(offloaded, folder, is_trainable=True).eval()
    assert loaded.hf_device_map == DEVICE_MAP
    assert not any(parameter.is_meta for name, parameter in loaded.named_parameters() if "lora_" in name)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    for each in (loaded, model):
        for parameter in each.parameters():
            parameter.requires_grad_(parameter.requires_grad and not parameter.is_meta)
        each(IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    found = {name: parameter.grad for name, parameter in loaded.named_parameters() if "lora_" in name}
    assert all(torch.allclose(found[name], grad, atol=1e-5) for name, grad in expected.items())
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.is_meta


def test_merging_into_an_offloaded_model(offloaded, saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(offloaded, folder)
    loaded.merge_adapter()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    loaded.unmerge_adapter()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_new_adapters_on_an_offloaded_model(offloaded):
    model = get_peft_model(offloaded, lora())
    model.add_adapter("second", lora())
    devices = {parameter.device.type for name, parameter in model.named_parameters() if "lora_" in name}
    assert devices == {"cpu"}
    model.set_adapter("second")
    model(IDS, labels=IDS).loss.backward()
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(llama()), atol=1e-6)


def test_what_cannot_be_computed_from_an_offloaded_weight_is_refused(offloaded):
    with pytest.raises(ValueError, match=r"'default' in 'model\.model\.layers\.0.*offload"):
        get_peft_model(offloaded, lora(use_dora=True))
    assert torch.allclose(logits(offloaded), logits(llama()), atol=1e-6)


def test_low_cpu_mem_usage_refuses_a_file_that_lacks_parameters(tmp_path):
    get_peft_model(llama(), lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    base = llama()
    config = lora(target_modules=["q_proj", "v_proj"])
    with pytest.warns(PeftWarning, match="v_proj"), pytest.raises(ValueError, match="lacks it"):
        PeftModel.from_pretrained(base, tmp_path, config=config, low_cpu_mem_usage=True)
    assert torch.equal(logits(base), logits(llama()))


@pytest.mark.gpu
def test_adapters_go_to_the_device_that_computes(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    device_map = {name: 0 if place == "cpu" else "cpu" for name, place in DEVICE_MAP.items()}
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=device_map).eval()
    torch.manual_seed(1)
    expected = get_peft_model(llama(), lora()).eval()
    expected.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", **options)
        devices = {parameter.device.type for name, parameter in loaded.named_parameters() if "lora_" in name}
        assert devices == {"cuda"}
        assert torch.allclose(logits(loaded).cpu(), logits(expected), atol=1e-4)
        base = loaded.unload()
