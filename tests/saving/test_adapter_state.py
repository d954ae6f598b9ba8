# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters as dicts of tensors: which tensors, under which names, and what loading them checks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    LoraConfig,
    PeftWarning,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict


class Net(nn.Module):
    """Two layers with biases, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(self.emb(ids)).relu())))


IDS = torch.arange(4)[None]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(base: nn.Module | None = None, shift: float = 0.1, name: str = "default", **settings):
    """A model whose adapter, and whatever trains with it, is not at its start."""
    settings = {"r": 2, "target_modules": ["first"], **settings}
    model = get_peft_model(net() if base is None else base, LoraConfig(**settings), adapter_name=name)
    randomise(model, shift)
    return model


def randomise(model: nn.Module, shift: float) -> None:
    generator = torch.Generator().manual_seed(int(shift * 1000))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(shift * torch.randn(parameter.shape, generator=generator))


def keys(model: nn.Module, **kwargs) -> list[str]:
    return sorted(key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(model, **kwargs))


# ---- names ---------------------------------------------------------------------------------------------------------
NAMES = [
    ({}, ["first.lora_A.weight", "first.lora_B.weight"]),
    ({"use_dora": True}, ["first.lora_A.weight", "first.lora_B.weight", "first.lora_magnitude_vector"]),
    ({"lora_bias": True}, ["first.lora_A.weight", "first.lora_B.bias", "first.lora_B.weight"]),
    (
        {"modules_to_save": ["head"]},
        ["first.lora_A.weight", "first.lora_B.weight", "head.bias", "head.weight"],
    ),
    (
        {"target_modules": ["emb"], "use_dora": True},
        ["emb.lora_embedding_A", "emb.lora_embedding_B", "emb.lora_magnitude_vector"],
    ),
    ({"bias": "lora_only"}, ["first.base_layer.bias", "first.lora_A.weight", "first.lora_B.weight"]),
    (
        {"bias": "all"},
        [
            "first.base_layer.bias",
            "first.lora_A.weight",
            "first.lora_B.weight",
            "head.bias",
            "norm.bias",
            "second.bias",
        ],
    ),
    (
        {"trainable_token_indices": {"emb": [1, 2]}},
        ["emb.token_adapter.trainable_tokens_delta", "first.lora_A.weight", "first.lora_B.weight"],
    ),
]


@pytest.mark.parametrize(("settings", "names"), NAMES, ids=lambda value: str(value)[:40])
def test_names(settings, names):
    assert keys(adapted(**settings), save_embedding_layers=False) == names


@pytest.mark.parametrize("settings", [settings for settings, _ in NAMES], ids=lambda value: str(value)[:40])
def test_round_trip_into_a_fresh_model(settings):
    model = adapted(**settings).eval()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    fresh = get_peft_model(net(), copy.deepcopy(model.peft_config["default"])).eval()
    result = set_peft_model_state_dict(fresh, state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(fresh(IDS), model(IDS))


# ---- biases --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_survive_where_another_adapter_sits_on_other_modules(bias):
    model = adapted(bias=bias).eval()
    expected = model(IDS)
    state = get_peft_model_state_dict(model)
    crowded = get_peft_model(net(), LoraConfig(r=2, target_modules=["second"]), adapter_name="other")
    crowded.add_adapter("default", LoraConfig(r=2, target_modules=["first"], bias="none"))
    crowded.set_adapter("default")
    crowded.peft_config["default"].bias = bias
    assert not set_peft_model_state_dict(crowded, state).unexpected_keys
    assert torch.equal(crowded.eval()(IDS), expected)
    again = get_peft_model_state_dict(crowded, adapter_name="default")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


# ---- several adapters ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [("a", "ab"), ("lora", "lora_A"), ("weight", "default")])
def test_names_that_overlap_are_kept_apart(names):
    model = adapted(name=names[0], use_dora=True)
    model.add_adapter(names[1], LoraConfig(r=3, target_modules=["first", "second"], use_dora=True))
    for name in names:
        model.set_adapter(name)
        randomise(model, 0.2)
    states = {name: get_peft_model_state_dict(model, adapter_name=name) for name in names}
    assert states[names[0]]["base_model.model.first.lora_A.weight"].shape[0] == 2
    assert states[names[1]]["base_model.model.first.lora_A.weight"].shape[0] == 3
    assert len(states[names[0]]) == 3 and len(states[names[1]]) == 6
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=names[1]).items()}
    set_peft_model_state_dict(model, {k: v + 1 for k, v in states[names[0]].items()}, adapter_name=names[0])
    after = get_peft_model_state_dict(model, adapter_name=names[1])
    assert all(torch.equal(after[key], before[key]) for key in before)


# ---- state dicts from elsewhere ------------------------------------------------------------------------------------
def test_a_gathered_state_dict_is_filtered_and_renamed():
    model = adapted(modules_to_save=["head"])
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered)
    own = get_peft_model_state_dict(model)
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key] + 1) for key in own)


def test_injected_adapters_have_no_prefix():
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"], init_lora_weights=False), net())
    state = get_peft_model_state_dict(model)
    assert sorted(state) == ["first.lora_A.weight", "first.lora_B.weight"]
    other = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), net())
    assert not set_peft_model_state_dict(other, state).missing_keys
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (8,)])
def test_factors_that_are_elsewhere_are_reported(shape):
    model = adapted()
    state = model.state_dict()
    key = "base_model.model.first.lora_A.default.weight"
    with pytest.warns(PeftWarning, match=r"'default': .*first\.lora_A\.weight are no matrices.*gathered"):
        get_peft_model_state_dict(model, {**state, key: torch.zeros(shape)})


def test_missing_and_unknown_keys_are_returned():
    model = adapted(modules_to_save=["head"])
    state = get_peft_model_state_dict(model)
    del state["base_model.model.first.lora_A.weight"], state["base_model.model.head.bias"]
    state["base_model.model.nothing.lora_A.weight"] = torch.zeros(1)
    result = set_peft_model_state_dict(model, state)
    assert sorted(result.missing_keys) == [
        "base_model.model.first.lora_A.default.weight",
        "base_model.model.head.modules_to_save.default.bias",
    ]
    assert result.unexpected_keys == ["base_model.model.nothing.lora_A.weight"]


def test_low_cpu_mem_usage_takes_the_tensors_themselves():
    model = adapted(use_dora=True).eval()
    state = get_peft_model_state_dict(model)
    fresh = get_peft_model(net(), copy.deepcopy(model.peft_config["default"]), low_cpu_mem_usage=True).eval()
    assert fresh.base_model.model.first.lora_A["default"].weight.is_meta
    assert not set_peft_model_state_dict(fresh, state, low_cpu_mem_usage=True).missing_keys
    assert torch.equal(fresh(IDS), model(IDS))


# ---- what does not fit ---------------------------------------------------------------------------------------------
def test_another_shape_changes_nothing_and_names_the_tensor():
    model = adapted()
    state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    key = "base_model.model.first.lora_A.weight"
    state[key] = torch.zeros(5, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"first\.lora_A.*\[5, 6\].*\[2, 6\]"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.warns(PeftWarning, match=r"first\.lora_A"):
        set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    after = get_peft_model_state_dict(model)
    assert torch.equal(after[key], before["base_model.model.first.lora_A.default.weight"])
    assert torch.equal(after["base_model.model.first.lora_B.weight"], state["base_model.model.first.lora_B.weight"])


def test_another_kind_of_dtype_is_refused():
    model = adapted()
    state = {key: value.to(torch.int8) for key, value in get_peft_model_state_dict(model).items()}
    with pytest.raises(RuntimeError, match=r"lora_.*int8"):
        set_peft_model_state_dict(model, state)


def test_a_lower_precision_is_converted():
    model = adapted()
    state = {key: value.half() for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    assert model.base_model.model.first.lora_A["default"].weight.dtype == torch.float32


# ---- embeddings ----------------------------------------------------------------------------------------------------
def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))


def embeddings(model: nn.Module, **kwargs) -> list[str]:
    return [key for key in keys(model, **kwargs) if "lora_" not in key and "trainable" not in key]


def test_embeddings_are_saved_where_they_are_adapted_or_asked_for():
    plain = adapted(llama(), target_modules=["q_proj"])
    assert embeddings(plain) == []
    assert embeddings(plain, save_embedding_layers=True) == ["lm_head.weight", "model.embed_tokens.weight"]
    on_embedding = adapted(llama(), target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(PeftWarning, match="save_embedding_layers"):
        assert embeddings(on_embedding) == ["model.embed_tokens.base_layer.weight"]
    assert embeddings(on_embedding, save_embedding_layers=False) == []


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_are_saved_without_the_embedding(tied):
    model = get_peft_model(llama(tied), TrainableTokensConfig(token_indices=[1, 5]))
    assert embeddings(model) == []


def test_a_resized_vocabulary_is_saved_with_the_adapter(tmp_path):
    llama().save_pretrained(tmp_path)
    base = llama()
    base.resize_token_embeddings(40)
    model = adapted(base, target_modules=["q_proj"])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    with pytest.warns(PeftWarning, match="32 to 40"):
        assert embeddings(model) == ["lm_head.weight", "model.embed_tokens.weight"]


# ---- the base model alone ------------------------------------------------------------------------------------------
def test_base_model_state_dict_round_trip():
    model = adapted(modules_to_save=["head"], trainable_token_indices={"emb": [1]}, bias="none", use_dora=True)
    plain = net().state_dict()
    state = get_base_model_state_dict(model)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[key], plain[key]) for key in plain)
    set_base_model_state_dict(model, {key: value + 1 for key, value in plain.items()})
    assert all(torch.equal(value, plain[key] + 1) for key, value in get_base_model_state_dict(model).items())
    before = get_base_model_state_dict(model)["first.weight"].clone()
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        set_base_model_state_dict(model, {"head.weight": plain["head.weight"]})
    assert torch.equal(get_base_model_state_dict(model)["first.weight"], before)
    result = set_base_model_state_dict(
        model, {"head.weight": plain["head.weight"], "x": plain["head.bias"]}, strict=False
    )
    assert "first.weight" in result.missing_keys and result.unexpected_keys == ["x"]
