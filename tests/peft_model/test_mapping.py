# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""From configs to models: `get_peft_model`, `get_peft_config`, `inject_adapter_in_model`, `peft.functional`."""

from __future__ import annotations

import pytest
import torch
from tiny_models import IDS, adapted, llama, logits, lora
from torch import nn

import peft
import peft.functional
import peft.mapping
from peft import LoraConfig, PeftModel, PeftWarning, get_peft_config, get_peft_model, inject_adapter_in_model


def test_class_by_task():
    assert type(get_peft_model(llama(), lora())) is peft.PeftModelForCausalLM
    assert type(get_peft_model(llama(), lora(task_type=None))) is PeftModel
    assert set(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == {
        "SEQ_CLS",
        "SEQ_2_SEQ_LM",
        "CAUSAL_LM",
        "TOKEN_CLS",
        "QUESTION_ANS",
        "FEATURE_EXTRACTION",
    }


@pytest.mark.parametrize(
    ("in_config", "of_model", "expected"),
    [(None, "", None), (None, "org/b", "org/b"), ("org/a", "", "org/a"), ("org/a", "org/a", "org/a")],
)
def test_name_of_the_base_model(in_config, of_model, expected):
    base = llama()
    base.name_or_path = of_model
    model = get_peft_model(base, lora(base_model_name_or_path=in_config))
    assert model.peft_config["default"].base_model_name_or_path == expected


def test_the_models_own_name_wins_with_a_warning():
    base = llama()
    base.name_or_path = "org/b"
    with pytest.warns(PeftWarning, match=r"org/a.*org/b"):
        model = get_peft_model(base, lora(base_model_name_or_path="org/a"))
    assert model.peft_config["default"].base_model_name_or_path == "org/b"


def test_revision():
    assert get_peft_model(llama(), lora(), revision="x").peft_config["default"].revision == "x"
    assert get_peft_model(llama(), lora(revision="y")).peft_config["default"].revision == "y"
    with pytest.warns(PeftWarning, match=r"'y'.*'x'"):
        assert get_peft_model(llama(), lora(revision="y"), revision="x").peft_config["default"].revision == "x"


def test_refusals():
    with pytest.raises(TypeError, match="got str"):
        get_peft_model("some/model", lora())
    with pytest.raises(TypeError, match="got dict.*get_peft_config"):
        get_peft_model(llama(), {"r": 2})
    with pytest.warns(PeftWarning, match="my_lora_x"):
        get_peft_model(llama(), lora(), adapter_name="my_lora_x")
    with pytest.raises(ValueError, match="no dot"):
        get_peft_model(llama(), lora(), adapter_name="a.b")


def test_get_peft_config():
    given = {"peft_type": "LORA", "r": 3}
    config = get_peft_config(given)
    assert type(config) is LoraConfig and config.r == 3 and given == {"peft_type": "LORA", "r": 3}
    for bad in ({"r": 3}, {"peft_type": "NOPE"}):
        with pytest.raises(ValueError, match="LORA"):
            get_peft_config(bad)


def test_mappings_are_one_and_live():
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING is peft.peft_model.PEFT_TYPE_TO_TUNER_MAPPING
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peft.LoraModel
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"
    assert peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING == {"LORA": peft.LoraModel}


def test_injection_in_place():
    base = llama()
    names = set(base.state_dict())
    result = inject_adapter_in_model(lora(target_modules=["q_proj"]), base, "mine")
    assert result is base and type(base.peft_config) is dict and list(base.peft_config) == ["mine"]
    assert not any(name.startswith("base_model") for name in base.state_dict())
    assert len(base.state_dict()) > len(names)
    assert sorted(peft.get_peft_model_state_dict(base, adapter_name="mine"))[0] == (
        "model.layers.0.self_attn.q_proj.lora_A.weight"
    )


def test_injection_follows_a_saved_adapter(tmp_path):
    model = adapted(target_modules=["k_proj"], layers_to_transform=[1])
    state = peft.get_peft_model_state_dict(model)
    base = llama()
    with pytest.warns(RuntimeWarning, match="q_proj"):
        inject_adapter_in_model(
            lora(target_modules=["q_proj"]),
            base,
            state_dict={key.removeprefix("base_model.model."): value for key, value in state.items()},
        )
    wrapped = [name for name, module in base.named_modules() if hasattr(module, "lora_A")]
    assert wrapped == ["model.layers.1.self_attn.k_proj"]


def test_injection_twice_and_functions_without_a_wrapper():
    base = inject_adapter_in_model(lora(), llama(), "one")
    inject_adapter_in_model(lora(r=3), base, "two")
    assert list(base.peft_config) == ["one", "two"]
    peft.functional.set_adapter(base, "two")
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.active_adapters == ["two"]
    peft.functional.set_requires_grad(base, "two", False)
    assert not layer.lora_A["two"].weight.requires_grad
    assert peft.functional.delete_adapter(base, "two", prefix="lora_") == ["one"]
    assert list(layer.lora_A) == ["one"]
    base(IDS)


def test_transformers_own_adapters(tmp_path):
    """transformers' add_adapter, save, load, disable and delete work on what is injected."""
    base = llama()
    expected = logits(base)
    base.add_adapter(lora(target_modules=["q_proj"]), "one")
    changed = logits(base)
    assert not torch.allclose(changed, expected, atol=1e-3)
    base.disable_adapters()
    assert torch.equal(logits(base), expected)
    base.enable_adapters()
    base.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path), "two")
    assert torch.equal(logits(other), changed)
    base.delete_adapter("one")
    assert torch.equal(logits(base), expected)


def test_a_model_with_adapters_of_transformers_can_be_wrapped():
    base = llama()
    base.add_adapter(lora(target_modules=["q_proj"]), "one")
    with pytest.warns(PeftWarning):
        model = get_peft_model(base, lora(), adapter_name="two")
    assert set(model.peft_config) == {"one", "two"}
    model(IDS)


def test_any_module_will_do():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], task_type="CAUSAL_LM"))
    assert model.get_base_model()(torch.ones(1, 3)).shape == (1, 3)
    assert model.base_model_torch_dtype is None
