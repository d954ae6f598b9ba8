# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters on base models that accelerate keeps on the CPU or on disk and brings in layer by layer."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
import transformers
from tiny_models import IDS, adapted, llama, logits, lora

from peft import LoraConfig, PeftModel, PeftWarning, dora, get_peft_model

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
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora-embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(params=CASES)
def saved(request, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(llama(), lora(**CASES[request.param])).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.works_with("accelerate", "saved adapters on layers on disk, trained further")
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


@pytest.mark.works_with("accelerate", "merging")
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


@pytest.mark.works_with("accelerate", "`device_map` with layers on disk: new DoRA adapters")
def test_new_dora_starts_from_the_norms_of_offloaded_weights(offloaded):
    torch.manual_seed(1)
    model = get_peft_model(offloaded, lora(use_dora=True)).eval()
    expected = adapted(use_dora=True)
    found = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(found[name], parameter)
    torch.testing.assert_close(logits(model), logits(expected))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.is_meta
    for each in (model.train(), expected.train()):
        optimizer = torch.optim.SGD([p for name, p in each.named_parameters() if "lora_" in name], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(IDS, labels=IDS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(model.eval()), logits(expected.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:use_dora_triton")
def test_the_reason_why_offloaded_weights_take_pytorch(offloaded):
    model = get_peft_model(offloaded, lora(use_dora=True, use_dora_triton=True))
    lines = dora.explain(model).splitlines()
    assert lines and all("torch (accelerate keeps the weight off the device" in line for line in lines)


def test_norms_follow_what_merging_writes(offloaded):
    torch.manual_seed(1)
    model = get_peft_model(offloaded, lora(use_dora=True)).eval()
    model.add_adapter("second", lora(use_dora=True))
    expected = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    model.base_model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_write_it_back(offloaded, start):
    model = get_peft_model(offloaded, lora(init_lora_weights=start)).eval()
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-3, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), logits(llama()), atol=1e-3)


@pytest.mark.works_with("accelerate", "`cpu_offload`")
@pytest.mark.parametrize("bias", [True, False])
def test_offloading_to_the_cpu(bias):
    from accelerate import cpu_offload

    base = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=bias), torch.nn.ReLU(), torch.nn.Conv1d(4, 4, 3, bias=bias))
    x = torch.randn(3, 4, 6)
    plain = copy.deepcopy(base)
    config = LoraConfig(r=2, target_modules=["0", "2"], use_dora=True, init_lora_weights=False, lora_dropout=0.4)
    models = []
    for each in (plain, cpu_offload(base, execution_device="cpu")):
        torch.manual_seed(2)
        models.append(get_peft_model(each, config))
    assert models[1].base_model.model[0].base_layer.weight.is_meta
    outputs = []
    for model in models:
        torch.manual_seed(3)
        outputs.append((model.train()(x), model.eval()(x)))
        outputs[-1][0].sum().backward()
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    before = dora_key(models[1])
    stored = base[0].base_layer._hf_hook.weights_map["weight"]
    with torch.no_grad():
        stored.mul_(2)
        plain[0].base_layer.weight.mul_(2)
    assert dora_key(models[1]) != before
    torch.testing.assert_close(models[0].eval()(x), models[1].eval()(x))


@pytest.mark.works_with("accelerate", "offloading a model with its adapters")
@pytest.mark.parametrize("use_dora", [True, False])
def test_adapters_that_are_offloaded_with_their_base(use_dora):
    base = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(4, 5))
    config = LoraConfig(r=2, target_modules=["0", "1", "2"], use_dora=use_dora, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        expected = model(ids)
        away = accelerate.cpu_offload(model, execution_device="cpu")
        assert all(parameter.is_meta for parameter in away.parameters())
        for _ in range(2):
            torch.testing.assert_close(away(ids), expected)


def dora_key(model):
    return model.base_model.model[0].norm_weight().key()


def test_only_the_rows_asked_for_come_to_the_device(offloaded, monkeypatch):
    model = get_peft_model(offloaded, lora(use_dora=True, target_modules=["down_proj"]))
    weight = model.base_model.model.model.layers[0].mlp.down_proj.norm_weight()
    assert type(weight).__name__ == "OffloadedWeight" and weight.device == torch.device("cpu")
    whole = dict(llama().named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(weight.rows(3, 5), whole[3:5]) and torch.equal(weight.dense(torch.float64), whole.double())
    with pytest.raises(ValueError, match="shape must be"):
        weight.write(whole.T)
    kept = weight.snapshot()
    weight.write(2 * whole)
    assert torch.equal(weight.dense(), 2 * whole)
    weight.restore(kept)
    assert torch.equal(weight.rows(0, 2), whole[:2])
    asked = []
    monkeypatch.setattr(dora.norm, "CHUNK_BYTES", 4 * 4 * whole.shape[1] * 3)
    monkeypatch.setattr(type(weight), "rows", lambda self, a, b, d=None: asked.append(b - a) or whole[a:b].to(d))
    dora.row_norm(weight, torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), 1.0)
    assert asked == [3, 3, 3, 3, 3, 1]


@pytest.mark.works_with("accelerate", "`prepare` and `accumulate`")
def test_prepare_changes_nothing():
    losses = []
    for prepared in (False, True):
        model = get_peft_model(llama(), lora(use_dora=True)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        if prepared:
            model, optimizer = accelerator.prepare(model, optimizer)
        losses.append([])
        for _ in range(2):
            for _ in range(2):
                with accelerator.accumulate(model):
                    loss = model(IDS, labels=IDS).loss
                    accelerator.backward(loss) if prepared else (loss / 2).backward()
                    if prepared:
                        optimizer.step()
                        optimizer.zero_grad()
                losses[-1].append(loss.item())
            if not prepared:
                optimizer.step()
                optimizer.zero_grad()
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]
    assert accelerator.unwrap_model(model).peft_config["default"].use_dora


@pytest.mark.works_with("accelerate", "`device_map='auto'`")
def test_an_automatic_device_map(tmp_path):
    llama().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map="auto", max_memory={"cpu": "9KB"}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in base.hf_device_map.values()
    torch.manual_seed(1)
    model = get_peft_model(base, lora(use_dora=True)).eval()
    torch.manual_seed(1)
    torch.testing.assert_close(logits(model), logits(adapted(use_dora=True)))


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
