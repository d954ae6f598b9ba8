# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The tables of default targets, the enums, and registering a method from outside."""

from __future__ import annotations

import pytest
import torch

import peft.utils
import peft.utils.other
from peft.utils import PeftError, PeftType, PeftWarning, TaskType, constants, register_peft_method
from peft.utils.error import NoMatchingPeftModuleError

TABLES = sorted(name for name in vars(constants) if name.startswith("TRANSFORMERS_MODELS_TO_"))


def test_tables_share_no_lists():
    lists = [targets for name in TABLES for targets in getattr(constants, name).values() if isinstance(targets, list)]
    assert len({id(targets) for targets in lists}) == len(lists) > 500


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_names(name):
    for model_type, targets in getattr(constants, name).items():
        assert model_type == model_type.strip() != ""
        names = [targets] if isinstance(targets, str) else targets
        assert all(target and " " not in target for target in names)
    if name.endswith("_TARGET_MODULES_MAPPING") and "OSF" not in name and "HIRA" not in name:
        assert getattr(peft.utils, name) is getattr(peft.utils.other, name) is getattr(constants, name)


def test_lora_targets_of_known_models():
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert len(table) == 40
    assert table["llama"] == ["q_proj", "v_proj"]
    assert table["gpt2"] == ["c_attn"]
    assert table["phi"] == ["q_proj", "v_proj", "fc1", "fc2"]
    assert isinstance(table["gemma4"], str)


def test_all_of_utils_is_there():
    for module in (peft.utils, peft.utils.other, constants):
        assert all(hasattr(module, name) for name in module.__all__)


def test_prefix_layouts():
    layers = [torch.randn(2, 3, 5, 4, 7) for _ in range(2)]  # [keys and values, batch, heads, tokens, head_dim]
    flat = torch.cat(layers)
    bloom = constants.bloom_model_postprocess_past_key_value(tuple(layers))
    assert len(bloom) == 2
    for layer, (keys, values) in enumerate(bloom):
        assert keys.shape == (15, 7, 4)
        assert values.shape == (15, 4, 7)
        torch.testing.assert_close(keys.flatten(), flat[layer].transpose(1, 2).flatten())
        torch.testing.assert_close(values.flatten(), flat[2 + layer].flatten())
    starcoder = constants.starcoder_model_postprocess_past_key_value(tuple(layers))
    assert starcoder[0].shape == (3, 4, 14)
    torch.testing.assert_close(starcoder[1][..., :7], layers[1][0, :, 0])
    torch.testing.assert_close(starcoder[1][..., 7:], layers[1][1, :, 0])


def test_enums_are_strings():
    assert PeftType.LORA == "LORA"
    assert TaskType("CAUSAL_LM") is TaskType.CAUSAL_LM
    assert len(PeftType) == 45
    assert all(member.name == member.value for member in (*PeftType, *TaskType))


def test_error_classes():
    assert issubclass(NoMatchingPeftModuleError, (PeftError, ValueError))
    assert issubclass(NoMatchingPeftModuleError, ValueError)
    assert issubclass(PeftWarning, UserWarning)


@pytest.fixture
def clean_registry():
    from peft.tuners import _registry

    mappings = [value for name, value in vars(_registry).items() if name.startswith("PEFT_TYPE_TO_")]
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(content)


def test_register_method(clean_registry):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    class Config: ...

    class Model: ...

    register_peft_method(name="boft", config_cls=Config, model_cls=Model)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BOFT] is Config
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BOFT] is Model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.BOFT] == "boft_"
    with pytest.raises(KeyError, match="registered already"):
        register_peft_method(name="boft", config_cls=Config, model_cls=Model)


@pytest.mark.parametrize(
    ("name", "prefix", "message"),
    [("BOFT", None, "lower case"), ("nothing", None, "NOTHING of PeftType"), ("boft", "lora_", "prefix of LORA")],
)
def test_register_method_refuses(clean_registry, name, prefix, message):
    with pytest.raises(ValueError, match=message):
        register_peft_method(name=name, config_cls=object, model_cls=object, prefix=prefix)
