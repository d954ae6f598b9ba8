# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Saved tensors that cannot be read or placed: what the error names, and that nothing is half done; old layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import nn

import peft.utils.save_and_load
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

A, B = (f"base_model.model.0.lora_{factor}.weight" for factor in "AB")
MAGNITUDE = "base_model.model.0.lora_magnitude_vector"


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **settings}
    return get_peft_model(base, LoraConfig(**settings))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- adapters ------------------------------------------------------------------------------------------------------
def test_an_unknown_adapter_is_named_with_those_that_there_are():
    model = adapted()
    for call in (
        lambda: get_peft_model_state_dict(model, adapter_name="nope"),
        lambda: set_peft_model_state_dict(model, {}, adapter_name="nope"),
    ):
        with pytest.raises(KeyError, match="'nope'.*'default'"):
            call()
    with pytest.raises(KeyError, match="none"):
        get_peft_model_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        (B, [1.0], TypeError),
        (B, torch.ones(8, 2, dtype=torch.int8), RuntimeError),
        (B, torch.ones(8, 3), RuntimeError),
        (B, torch.tensor(1.0), RuntimeError),
    ],
)
def test_a_wrong_value_changes_nothing(key, value, error):
    model = adapted()
    before = values(model)
    saved = {A: torch.full((2, 6), 9.0), B: torch.full((8, 2), 9.0), key: value}
    with pytest.raises(error, match=r"0\.lora_B"):
        set_peft_model_state_dict(model, saved)
    assert same(values(model), before)


@pytest.mark.parametrize("name", ["default", "default_2", "def", "lora_A", "weight", "base_layer"])
def test_adapter_names_like_parts_of_keys(name):
    model = adapted()
    if name != "default":
        model.add_adapter(name, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    saved = {
        key: torch.full_like(value, 3.0) for key, value in get_peft_model_state_dict(model, adapter_name=name).items()
    }
    assert list(saved) == [A, B]
    others = {key: value for key, value in values(model).items() if f".{name}." not in key.split("lora_", 1)[-1]}
    result = set_peft_model_state_dict(model, saved, adapter_name=name)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(get_peft_model_state_dict(model, adapter_name=name), saved)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())


@pytest.mark.parametrize(
    "old_name",
    [
        MAGNITUDE,
        f"{MAGNITUDE}.weight",
        f"{MAGNITUDE}.default.weight",
    ],
)
def test_layouts_of_the_magnitude(old_name):
    model = adapted(use_dora=True)
    state = get_peft_model_state_dict(model)
    new = torch.arange(8.0)
    state = {(old_name if key == MAGNITUDE else key): value for key, value in state.items()} | {old_name: new}
    result = set_peft_model_state_dict(model, state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model.base_model.model[0].lora_magnitude_vector["default"].weight, new)


def test_a_state_dict_from_memory_is_taken_as_it_is():
    source, model = adapted(use_dora=True), adapted(use_dora=True)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    state = {key: value for key, value in source.state_dict().items() if "lora_" in key}
    result = set_peft_model_state_dict(model, state)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(get_peft_model_state_dict(model), get_peft_model_state_dict(source))


def test_biases_are_named_by_the_adapter_and_not_by_its_config():
    """The config may have been changed since, or the adapter been injected by a state dict."""
    model = adapted(bias="lora_only", target_modules=["0"])
    model.peft_config["default"].target_modules = {"2"}
    assert "base_model.model.0.base_layer.bias" in get_peft_model_state_dict(model)


def test_compiled_models_are_looked_into_on_request():
    compiled = torch.compile(adapted())
    assert list(get_peft_model_state_dict(compiled, unwrap_compiled=True)) == [A, B]
    assert list(get_peft_model_state_dict(compiled)) == [f"_orig_mod.{A}", f"_orig_mod.{B}"]


def test_packages_can_replace_the_sharding(monkeypatch):
    model = adapted()
    seen = []

    def shard(model, state_dict, adapter_name):
        seen.append(adapter_name)
        return {key: value + 1 for key, value in state_dict.items()}

    monkeypatch.setattr(peft.utils.save_and_load, "_maybe_shard_state_dict_for_tp", shard)
    set_peft_model_state_dict(model, {A: torch.zeros(2, 6), B: torch.zeros(8, 2)})
    assert seen == ["default"]
    assert all((value == 1).all() for value in get_peft_model_state_dict(model).values())


# ---- files ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(get_peft_model_state_dict(adapted()), tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices(folder, device):
    assert all(value.device.type == "cpu" for value in load_peft_weights(folder, device=device).values())


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_that_cannot_be_used_is_not_blamed_on_the_file(folder, device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        load_peft_weights(folder, device=device)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"^0": "5"}, "base_model.model.5.lora_A.weight"),
        ({"^base_model": "x"}, A),  # patterns speak of names in the base model
        ({"^0": "5", "lora_A": "x"}, "base_model.model.5.lora_A.weight"),  # the first that matches is the last
        ({r"^(\d)\.": r"layers.\1."}, "base_model.model.layers.0.lora_A.weight"),
    ],
)
def test_key_mapping(folder, mapping, expected):
    assert next(iter(load_peft_weights(folder, key_mapping=mapping))) == expected


def test_the_hub_is_asked_for_safetensors_first_and_given_every_argument(monkeypatch, folder):
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
    calls = []

    def download(repo_id, filename, **kwargs):
        calls.append((repo_id, filename, kwargs))
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError("no such file")
        return os.path.join(folder, filename)

    monkeypatch.setattr(peft.utils.save_and_load, "hf_hub_download", download)
    assert list(load_peft_weights("some/adapter", device="cpu", subfolder="s", revision="r", use_auth_token="t")) == [
        "a"
    ]
    arguments = {"subfolder": "s", "revision": "r", "token": "t"}
    assert calls == [("some/adapter", f"adapter_model.{kind}", arguments) for kind in ("safetensors", "bin")]


def test_what_the_hub_said_is_part_of_the_error(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(peft.utils.save_and_load, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"'some/adapter'.*ConnectionError: the line is dead"):
        load_peft_weights("some/adapter")


# ---- the base model ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [torch.zeros(9), torch.zeros(4, dtype=torch.int64)])
def test_a_base_model_is_loaded_whole_or_not_at_all(wrong):
    model = adapted(modules_to_save=["2"])
    before = values(model)
    state = {key: value + 1 for key, value in get_base_model_state_dict(model).items()} | {"2.bias": wrong}
    with pytest.raises(RuntimeError, match=r"2\.(original_module\.)?bias"):
        set_base_model_state_dict(model, state)
    assert same(values(model), before)
