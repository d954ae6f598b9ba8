# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What `LoraConfig` accepts, refuses and changes."""

from __future__ import annotations

import pytest

from peft import LoraConfig, LoraRuntimeConfig, PeftType
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

ACCEPTED = [
    {"target_modules": "x.*"},
    {"task_type": "SEQ_CLS"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 0},
    {"modules_to_save": "head"},
    {"rank_pattern": None},
    {"alpha_pattern": {"a": 4}},
    {"target_parameters": ["w"]},
    {"layer_replication": [[0, 2]]},
    {"use_dora": True, "megatron_config": {}},
    {"use_dora": True, "use_rslora": True},
    {"use_dora": True, "bias": "all"},
    {"use_dora": True, "init_lora_weights": "pissa"},
    {"use_dora": True, "alora_invocation_tokens": [1]},
    {"use_dora": True, "use_dora_triton": True},
    {"kasa_config": KasaConfig()},
    {"velora_config": VeloraConfig()},
    {"monteclora_config": MontecloraConfig()},
    {"use_bdlora": BdLoraConfig()},
    {"arrow_config": ArrowConfig()},
    {"lora_ga_config": LoraGAConfig()},
    {"lora_bias": True, "bias": "all"},
    {"trainable_token_indices": [1]},
    {"trainable_token_indices": {"emb": [1]}},
    {"ensure_weight_tying": True},
    *({"init_lora_weights": init} for init in (False, None, "gaussian", "olora", "pissa", "pissa_niter_4")),
    *({"init_lora_weights": init} for init in ("orthogonal", "mica", "lora_ga")),
]
REFUSED = [
    ({"task_type": "bad"}, ValueError, "task_type='bad'"),
    ({"target_modules": "x.*", "layers_to_transform": [0]}, ValueError, "layers_to_transform"),
    ({"target_modules": "x.*", "layers_pattern": "h"}, ValueError, "layers_pattern"),
    ({"layers_pattern": "h"}, ValueError, "layers_to_transform"),
    ({"target_parameters": "w"}, TypeError, "target_parameters='w'"),
    ({"use_dora": True, "megatron_config": {"a": 1}}, ValueError, "megatron_config"),
    ({"use_dora": True, "init_lora_weights": "loftq"}, ValueError, "loftq"),
    ({"init_lora_weights": "loftq"}, ValueError, "loftq_config"),
    ({"init_lora_weights": "loftq", "loftq_config": {}}, ValueError, "loftq_config"),
    ({"lora_bias": True, "init_lora_weights": "pissa"}, ValueError, "'pissa'"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, ValueError, "'gaussian'"),
    # what nobody can mean, though some releases take it
    ({"r": 0}, ValueError, "r=0"),
    ({"r": -1}, ValueError, "r=-1"),
    ({"r": 2.5}, ValueError, "r=2.5"),
    ({"bias": "bad"}, ValueError, "bias='bad'"),
    ({"init_lora_weights": "bad"}, ValueError, "init_lora_weights='bad'"),
    ({"lora_dropout": 2.0}, ValueError, "lora_dropout=2.0"),
    ({"use_dora_triton": True}, ValueError, "use_dora=True"),
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_accepted_as_given(settings):
    config = LoraConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.peft_type == PeftType.LORA


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED, ids=str)
def test_refused_with_the_argument_and_its_value(settings, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**settings)


def test_lists_of_names_become_sets():
    config = LoraConfig(target_modules=["b", "a", "b"], exclude_modules=["c"])
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}


@pytest.mark.parametrize(("init", "option"), [("eva", EvaConfig), ("corda", CordaConfig)])
def test_a_start_brings_its_settings(init, option):
    assert getattr(LoraConfig(init_lora_weights=init), f"{init}_config") == option()


def test_loftq_settings_become_a_dict():
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8))
    assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 1}


@pytest.mark.parametrize(("name", "value"), [("eva_config", EvaConfig()), ("loftq_config", LoftQConfig())])
def test_settings_of_another_start_are_warned_about(name, value):
    with pytest.warns(UserWarning, match=name):
        LoraConfig(init_lora_weights="gaussian", **{name: value})


def test_nested_settings_come_back_from_dicts():
    config = LoraConfig(init_lora_weights="eva", eva_config={"rho": 3.0}, arrow_config={"top_k": 2})
    assert config.eva_config == EvaConfig(rho=3.0) and config.arrow_config == ArrowConfig(top_k=2)


def test_settings_of_a_process_are_not_part_of_the_dict():
    config = LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert "runtime_config" not in config.to_dict()
    assert "use_dora_triton" not in config.to_dict()
    assert LoraConfig(use_dora=True, use_dora_triton=True).to_dict()["use_dora_triton"] is True
