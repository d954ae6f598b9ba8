# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What `LoraConfig` and its options take, change and refuse."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
from torch import nn

from peft import LoraConfig, PeftType
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


# ---- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_modules": "x.*", "layers_to_transform": [0]}, "layers_to_transform=.*'x.*'"),
        ({"target_modules": "x.*", "layers_pattern": "h"}, "layers_pattern='h'"),
        ({"layers_pattern": "h"}, "layers_pattern='h'.*layers_to_transform"),
        ({"use_dora_triton": True}, "use_dora_triton=True needs use_dora=True"),
        ({"init_lora_weights": "loftq"}, "needs loftq_config"),
        ({"use_dora": True, "init_lora_weights": "loftq"}, "needs loftq_config"),
        ({"init_lora_weights": "loftq", "loftq_config": {}}, "needs loftq_config"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias=True.*'pissa'"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True.*'gaussian'"),
    ],
)
def test_refused_values_are_named_with_the_remedy(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**kwargs)


def test_target_parameters_is_a_list():
    with pytest.raises(TypeError, match="target_parameters='w'"):
        LoraConfig(target_parameters="w")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EvaConfig(rho=0.5), "rho=0.5"),
        (lambda: EvaConfig(tau=1.5), "tau=1.5"),
        (lambda: LoraGAConfig(direction="up"), "direction='up'.*ArBr"),
        (lambda: LoraGAConfig(scale="big"), "scale='big'.*stable"),
        (lambda: ArrowConfig(top_k=0), "top_k=0"),
        (lambda: ArrowConfig(router_temperature=0.0), "router_temperature=0.0"),
    ],
)
def test_refused_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- what is taken -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "init",
    [
        True,
        False,
        None,
        "gaussian",
        "olora",
        "pissa",
        "pissa_niter_4",
        "PISSA_niter_16",
        "orthogonal",
        "mica",
        "lora_ga",
    ],
)
def test_starts(init):
    assert LoraConfig(init_lora_weights=init).init_lora_weights == init


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases(bias):
    assert LoraConfig(bias=bias, use_dora=True).bias == bias


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
    {"use_dora": True, "megatron_config": {}},
    {"use_dora": True, "use_rslora": True},
    {"use_dora": True, "init_lora_weights": "pissa"},
    {"use_dora": True, "alora_invocation_tokens": [1]},
    {"use_dora": True, "use_qalora": True},
    {"use_dora": True, "target_parameters": ["w"]},
    {"use_dora": True, "use_dora_triton": True},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_accepted_as_given(settings):
    config = LoraConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_ranks_of_other_integer_types_become_int():
    config = LoraConfig(r=np.int64(3))
    assert type(config.r) is int and config.r == 3


# ---- what is changed -----------------------------------------------------------------------------------------------
def test_lists_of_names_become_sets_and_patterns_stay():
    config = LoraConfig(target_modules=["b", "a", "b"], exclude_modules=["c"])
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}
    assert LoraConfig(target_modules="x.*").target_modules == "x.*"
    assert LoraConfig().target_modules is None


def test_the_type_is_set():
    assert LoraConfig(peft_type="IA3").peft_type is PeftType.LORA


@pytest.mark.parametrize(
    ("name", "option", "more"),
    [
        ("eva_config", EvaConfig(tau=0.5), {"init_lora_weights": "eva"}),
        ("corda_config", CordaConfig(corda_method="kpm"), {"init_lora_weights": "corda"}),
        ("lora_ga_config", LoraGAConfig(stable_gamma=8), {"init_lora_weights": "lora_ga"}),
        ("velora_config", VeloraConfig(num_groups=4), {}),
        ("monteclora_config", MontecloraConfig(num_samples=2), {}),
        ("use_bdlora", BdLoraConfig(nblocks=2, target_modules_bd_a=["q"]), {}),
        ("arrow_config", ArrowConfig(top_k=2), {}),
        ("kasa_config", KasaConfig(beta=0.1), {}),
    ],
)
def test_options_given_as_dicts_become_their_classes(name, option, more):
    assert getattr(LoraConfig(**{name: vars(option)}, **more), name) == option


def test_starts_that_need_an_option_get_the_default_one():
    with pytest.warns(UserWarning, match="'eva' without eva_config: its defaults"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    assert LoraConfig(init_lora_weights="corda").corda_config == CordaConfig()


@pytest.mark.parametrize(
    "kwargs",
    [{"eva_config": EvaConfig()}, {"corda_config": CordaConfig()}, {"loftq_config": {"loftq_bits": 4}}],
)
def test_options_without_effect_are_reported(kwargs):
    with pytest.warns(UserWarning, match=f"{next(iter(kwargs))} has no effect"):
        LoraConfig(**kwargs)


def test_loftq_config_is_kept_as_a_dict():
    for given in (LoftQConfig(loftq_bits=2), {"loftq_bits": 2, "loftq_iter": 1}):
        config = LoraConfig(init_lora_weights="loftq", loftq_config=given)
        assert config.loftq_config == {"loftq_bits": 2, "loftq_iter": 1}


# ---- as an object --------------------------------------------------------------------------------------------------
def test_configs_do_not_share_their_dicts():
    LoraConfig().rank_pattern["a"] = 1
    assert LoraConfig().rank_pattern == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal(duplicate):
    config = LoraConfig(target_modules=["a"], rank_pattern={"a": 2}, kasa_config=KasaConfig())
    assert duplicate(config) == config


def test_custom_modules_are_not_saved():
    config = LoraConfig()
    config._register_custom_module({nn.Bilinear: nn.Identity})
    config._register_custom_module({nn.LSTM: nn.Identity})
    assert set(config._custom_modules) == {nn.Bilinear, nn.LSTM}
    assert not any("custom" in key for key in config.to_dict())


def test_every_field_is_in_the_docstring():
    documented = set(re.findall(r"^\s{8}(\w+):", LoraConfig.__doc__, re.MULTILINE))
    own: dict[str, Any] = {
        name: None for name in LoraConfig.__dataclass_fields__ if name not in LoraConfig.__base__.__dataclass_fields__
    }
    assert set(own) <= documented
