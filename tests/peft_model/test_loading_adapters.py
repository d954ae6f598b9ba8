# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Loading adapters: what comes back, what stays as it is, and what is refused without a trace."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import adapted, llama, logits, lora, trained

import peft.peft_model
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PeftWarning

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A model with two adapters, and the folder it was saved to."""
    model = adapted(use_dora=True)
    model.add_adapter("other", lora(r=3))
    model.save_pretrained(tmp_path)
    return model.eval(), tmp_path


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def snapshot(model):
    return {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}


def same(model, before):
    now = dict(model.named_parameters())
    return now.keys() == before.keys() and all(
        torch.equal(now[name], tensor) and now[name].requires_grad == flag for name, (tensor, flag) in before.items()
    )


def test_round_trip(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(llama().train(), folder)
    assert type(loaded) is PeftModelForCausalLM and not loaded.training
    assert list(loaded.peft_config) == ["default"] and type(loaded.peft_config["default"]) is LoraConfig
    assert loaded.peft_config["default"].inference_mode and not trained(loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_loading_for_training(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(llama().train(), folder, is_trainable=True)
    assert loaded.training and trained(loaded) == {"default"}
    assert loaded.peft_config["default"].inference_mode is False
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_other_names_and_folders(saved):
    model, folder = saved
    model.set_adapter("other")
    expected = logits(model)
    for where in ({"model_id": folder / "other"}, {"model_id": str(folder), "subfolder": "other"}):
        loaded = PeftModel.from_pretrained(llama(), adapter_name="mine", **where)
        assert loaded.active_adapter == "mine" and torch.equal(logits(loaded), expected)


def test_class_follows_the_task_and_own_subclasses_stay(saved):
    class Mine(PeftModelForCausalLM):
        pass

    _, folder = saved
    assert type(PeftModelForSeq2SeqLM.from_pretrained(llama(), folder)) is PeftModelForCausalLM
    assert type(Mine.from_pretrained(llama(), folder)) is Mine


def test_a_config_of_ones_own(saved):
    _, folder = saved
    config = PeftConfig.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(llama(), folder, config=config, is_trainable=True)
    assert loaded.peft_config["default"] is config and config.inference_mode is False
    with pytest.raises(ValueError, match="must be a PeftConfig, got dict"):
        PeftModel.from_pretrained(llama(), folder, config={"r": 2})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        PeftModel.from_pretrained("some/model", folder)


def test_arguments_for_base_models_have_no_meaning(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(
        llama(), folder, torch_dtype="auto", trust_remote_code=True, device_map="auto", offload_folder="x"
    )
    assert torch.equal(logits(loaded), logits(model))


def test_load_adapter(saved):
    model, folder = saved
    loaded = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    before = snapshot(loaded)
    result = loaded.load_adapter(folder / "other", "other")
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert loaded.active_adapter == "default" and not loaded.training and trained(loaded) == {"default"}
    now = snapshot(loaded)
    assert all(torch.equal(now[name][0], before[name][0]) for name in before)
    model.set_adapter("other")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))


def test_load_adapter_for_training(saved):
    _, folder = saved
    loaded = PeftModel.from_pretrained(llama(), folder).train()
    loaded.load_adapter(folder / "other", "other", is_trainable=True)
    assert loaded.training and trained(loaded) == {"other"}
    assert loaded.active_adapter == "default" and not loaded.peft_config["other"].inference_mode


def test_load_onto_an_existing_adapter(saved):
    model, folder = saved
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    model.load_adapter(folder, "default", is_trainable=True)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight is weight
    assert torch.equal(weight, kept) and weight.requires_grad and set(model.peft_config) == {"default", "other"}


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_values_come_back_bit_for_bit_whatever_the_base_models_dtype(saved, base_dtype, low_cpu_mem_usage):
    _, folder = saved
    loaded = PeftModel.from_pretrained(llama().to(base_dtype), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(folder / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    for name, where in (("default", folder), ("other", folder / "other")):
        now = peft.get_peft_model_state_dict(loaded, adapter_name=name)
        then = load_file(where / WEIGHTS)
        assert now.keys() == then.keys()
        assert all(torch.equal(now[key], then[key]) and now[key].dtype == then[key].dtype for key in then)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    logits(loaded)


def test_low_cpu_mem_usage_casts_half_precision_files(saved):
    _, folder = saved
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        loaded = PeftModel.from_pretrained(
            llama().bfloat16(), folder, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast
        )
        assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {dtype}


def test_ephemeral_gpu_offload_reaches_the_config(saved):
    _, folder = saved
    loaded = PeftModel.from_pretrained(llama(), folder, ephemeral_gpu_offload=True)
    assert loaded.peft_config["default"].runtime_config.ephemeral_gpu_offload
    config = PeftConfig(peft_type="LORA")
    with pytest.raises(ValueError, match="ephemeral_gpu_offload"):
        PeftModel.from_pretrained(llama(), folder, config=config, ephemeral_gpu_offload=True)


def test_key_mapping(saved):
    model, folder = saved

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("model.layers.", "decoder.blocks.")] = tensors.pop(key)

    rewrite(folder / WEIGHTS, rename)
    loaded = PeftModel.from_pretrained(llama(), folder, key_mapping={r"decoder\.blocks\.": "model.layers."})
    assert torch.equal(logits(loaded), logits(model))


def test_missing_and_unexpected_tensors_are_named(saved):
    _, folder = saved
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def change(tensors):
        tensors["base_model.model.model.nothing.lora_A.weight"] = tensors.pop(gone)

    rewrite(folder / "other" / WEIGHTS, change)
    loaded = PeftModel.from_pretrained(llama(), folder)
    with pytest.warns(PeftWarning) as caught:
        result = loaded.load_adapter(folder / "other", "other")
    text = " ".join(str(warning.message) for warning in caught)
    assert "layers.0.self_attn.q_proj.lora_A" in text and "nothing.lora_A" in text and str(folder) in text
    assert len(result.missing_keys) == 1 and len(result.unexpected_keys) == 1


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def wrong_shape(folder):
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({KEY: torch.zeros(5, 5)}))


def wrong_kind(folder):
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int32)}))


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def broken_config(folder):
    (folder / "adapter_config.json").write_text("{")


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
DAMAGES = [
    (truncate, WEIGHTS),
    (empty, WEIGHTS),
    (wrong_shape, r"layers\.1\.self_attn\.v_proj\.lora_B"),
    (wrong_kind, r"layers\.1\.self_attn\.v_proj\.lora_B"),
    (no_weights, WEIGHTS),
    (no_config, r"adapter_config\.json"),
    (broken_config, r"adapter_config\.json"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_left_as_it_was(saved, damage, message):
    model, folder = saved
    damage(folder / "other")
    base = llama()
    expected = snapshot(base)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        PeftModel.from_pretrained(base, folder / "other")
    assert snapshot(base).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name][0]) for name, tensor in base.named_parameters())
    assert torch.equal(logits(base), logits(llama()))

    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        model.load_adapter(folder / "other", "third")
    assert list(model.peft_config) == ["default", "other"] and same(model, before)
    if damage not in (no_config, broken_config):  # of an adapter that is there, only the tensors are read
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
            model.load_adapter(folder / "other", "other")
        assert same(model, before)


def test_a_method_of_another_version_is_named(saved):
    _, folder = saved
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["peft_type"] = "SOME_NEW_METHOD"
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, KeyError), match="SOME_NEW_METHOD"):
        PeftModel.from_pretrained(llama(), folder)


def test_loading_goes_through_the_public_names(saved, monkeypatch):
    _, folder = saved
    calls = []
    for name in ("load_peft_weights", "set_peft_model_state_dict"):
        original = getattr(peft.peft_model, name)
        monkeypatch.setattr(
            peft.peft_model, name, lambda *a, _f=original, _n=name, **k: calls.append(_n) or _f(*a, **k)
        )
    PeftModel.from_pretrained(llama(), folder)
    assert calls == ["load_peft_weights", "set_peft_model_state_dict"]


def test_trainer_resumes_a_checkpoint_folder(saved):
    """As transformers' Trainer does it: default at the root, others in folders of their name."""
    model, folder = saved
    resumed = adapted(use_dora=True)
    resumed.add_adapter("other", lora(r=3))
    for path in (folder, folder / "other"):
        name = "default" if path == folder else path.name
        resumed.load_adapter(path, name, is_trainable=resumed.active_adapter == name)
    for name in ("default", "other"):
        model.set_adapter(name)
        resumed.set_adapter(name)
        assert torch.equal(logits(resumed.eval()), logits(model.eval()))
