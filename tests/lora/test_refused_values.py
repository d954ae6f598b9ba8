# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Values that no adapter can be made with: a config holds them, whatever makes an adapter of it refuses them, and leaves
the model as it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, inject_adapter_in_model

REFUSED = [
    ({"r": 0}, ValueError, "r=0 must be a positive integer"),
    ({"r": -1}, ValueError, "r=-1 must be"),
    ({"r": 2.5}, TypeError, "r=2.5 must be"),
    ({"r": True}, TypeError, "r=True must be"),
    ({"r": None}, TypeError, "r=None must be"),
    ({"rank_pattern": {"2": 0}}, ValueError, r"rank_pattern\['2'\]=0 must be"),
    ({"rank_pattern": {"2": "8"}}, TypeError, r"rank_pattern\['2'\]='8' must be"),
    ({"bias": "some"}, NotImplementedError, "bias='some' is unknown: use one of 'none', 'all', 'lora_only'"),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout=-0.1 must lie between 0 and 1"),
    ({"lora_dropout": 1.5}, ValueError, "lora_dropout=1.5"),
    ({"lora_dropout": "much"}, TypeError, "lora_dropout='much'"),
    ({"init_lora_weights": "nonsense"}, ValueError, "init_lora_weights='nonsense' is unknown.*'gaussian'"),
    ({"init_lora_weights": "pissa_niter_"}, ValueError, "init_lora_weights='pissa_niter_'"),
    ({"init_lora_weights": "pissa_niter_x"}, ValueError, "init_lora_weights='pissa_niter_x'"),
]
every_value = pytest.mark.parametrize(("options", "kind", "message"), REFUSED)


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def config_of(**options: object) -> LoraConfig:
    return LoraConfig(target_modules=["0", "2"], **options)


def state_of(model: nn.Module) -> list[tuple[str, type, bool | None]]:
    modules = [(name, type(module), None) for name, module in model.named_modules()]
    return modules + [(name, type(p), p.requires_grad) for name, p in model.named_parameters()]


@every_value
@pytest.mark.parametrize(
    "make",
    [
        get_peft_model,
        lambda model, config: get_peft_model(model, config, mixed=True),
        lambda model, config: LoraModel(model, config, "default"),
        lambda model, config: inject_adapter_in_model(config, model),
    ],
    ids=["peft", "mixed", "tuner", "injected"],
)
def test_a_first_adapter(make, options, kind, message):
    model = base_model()
    before = state_of(model)
    with pytest.raises(kind, match=message):
        make(model, config_of(**options))
    assert state_of(model) == before and not hasattr(model, "peft_config")


@every_value
@pytest.mark.parametrize("mixed", [False, True])
def test_a_further_adapter(mixed, options, kind, message):
    model = get_peft_model(base_model(), config_of(), mixed=mixed)
    before = state_of(model)
    with pytest.raises(kind, match=message):
        model.add_adapter("other", config_of(**options))
    assert state_of(model) == before and list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


@every_value
def test_a_saved_adapter(tmp_path, options, kind, message):
    model = get_peft_model(base_model(), config_of())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    base = base_model()
    plain, before = state_of(base), state_of(model)
    with pytest.raises(kind, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(kind, match=message):
        model.load_adapter(tmp_path, "other")
    assert state_of(base) == plain and not hasattr(base, "peft_config")
    assert state_of(model) == before and list(model.peft_config) == ["default"]


@every_value
def test_the_config_is_built_and_saved(tmp_path, options, kind, message):
    config_of(**options).save_pretrained(tmp_path)
    loaded = LoraConfig.from_pretrained(tmp_path)
    for name, value in options.items():
        assert getattr(loaded, name) == value
