# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Finding modules by name, and the small things around a model's call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import llama, t5
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask

from peft import LoraConfig, get_peft_model
from peft.utils import other
from peft.utils.other import (
    _get_batch_size,
    _get_input_embeddings_name,
    _get_submodules,
    _is_valid_match,
    _prepare_prompt_learning_config,
    get_pattern_key,
    id_tensor_storage,
    match_target_against_key,
    shift_tokens_right,
    str_to_bool,
    transpose,
)
from peft.utils.peft_types import PeftType


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        (["q_proj", "model.q_proj"], "a.model.q_proj", "q_proj"),
        (["^model.q"], "model.q", "^model.q"),
        (["^model.q"], "x.model.q", "x.model.q"),
        (["proj"], "q_proj", "q_proj"),
        ([r"layers\.\d+\.q"], "model.layers.3.q", r"layers\.\d+\.q"),
        (["a|b"], "x.b", "a|b"),
        ([], "a.b", "a.b"),
    ],
)
def test_pattern_key(patterns, name, expected):
    assert get_pattern_key(patterns, name) == expected


def test_names_match_at_dots():
    assert _is_valid_match("a.b", "b")
    assert not _is_valid_match("ab", "b")
    assert match_target_against_key("q", "a.q") is None
    assert match_target_against_key(r".*\.(q|v)", "a.v")


def test_submodules():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2))})
    parent, target, name = _get_submodules(model, "a.0")
    assert (parent, target, name) == (model["a"], model["a"][0], "0")
    assert _get_submodules(model, "a") == (model, model["a"], "a")
    with pytest.raises(AttributeError):
        _get_submodules(model, "a.7")


def test_input_embedding_name():
    assert _get_input_embeddings_name(llama()) == "model.embed_tokens"
    assert _get_input_embeddings_name(t5()) == "shared"
    assert _get_input_embeddings_name(nn.Linear(2, 2), "x") == "x"


def test_storage_identity():
    tensor = torch.zeros(4, 4)
    assert id_tensor_storage(tensor) == id_tensor_storage(tensor[1:].T)
    assert id_tensor_storage(tensor) != id_tensor_storage(tensor.clone())
    meta = torch.zeros(4, device="meta")
    assert id_tensor_storage(meta) == id_tensor_storage(meta[1:])
    assert id_tensor_storage(meta) != id_tensor_storage(torch.zeros(4, device="meta"))
    sparse, other_sparse = tensor.to_sparse(), tensor.to_sparse()
    assert id_tensor_storage(sparse) != id_tensor_storage(other_sparse)


def test_transpose_shares_memory():
    weight = nn.Parameter(torch.zeros(2, 3))
    turned = transpose(weight, True)
    assert isinstance(turned, nn.Parameter)
    assert turned.shape == (3, 2)
    assert turned.data_ptr() == weight.data_ptr()
    assert transpose(weight, False) is weight


def test_shift_tokens_right():
    labels = torch.tensor([[5, 6, -100], [1, -100, -100]])
    assert shift_tokens_right(labels, 0, 9).tolist() == [[9, 5, 6], [9, 1, 0]]
    assert labels[0, 2] == -100
    with pytest.raises(ValueError, match="pad_token_id is None"):
        shift_tokens_right(labels, None, 9)


def test_str_to_bool():
    assert [str_to_bool(text) for text in ("yes", "T", "ON", "1")] == [1] * 4
    assert [str_to_bool(text) for text in ("no", "F", "off", "0")] == [0] * 4
    with pytest.raises(ValueError, match="'maybe'"):
        str_to_bool("maybe")


def test_batch_size():
    assert _get_batch_size(torch.zeros(3, 2), None) == 3
    assert _get_batch_size(None, torch.zeros(4, 2, 3)) == 4
    with pytest.raises(ValueError, match="Neither input_ids nor inputs_embeds"):
        _get_batch_size(None, None)


def test_infer_device():
    assert other.infer_device() in ("cpu", "cuda", "mps", "xpu", "npu", "mlu")
    torch.zeros(1, device=other.infer_device())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_mask_is_the_models_own(attention):
    model = llama()
    model.set_attn_implementation(attention)
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    call = {"attention_mask": padding, "past_key_values": None, "position_ids": None}
    mask = other.create_attention_mask(
        model,
        model_input={"inputs_embeds": None},
        cache_position=torch.arange(4),
        batch_size=2,
        sequence_length=4,
        **call,
    )
    truth = create_causal_mask(model.config, torch.zeros(2, 4, 16), **call)
    assert mask.shape == (2, 1, 4, 4)
    assert torch.equal(mask, truth)


def test_attention_mask_of_a_static_cache():
    model = llama()
    mask = other.create_attention_mask(
        model,
        model_input={},
        attention_mask=torch.tensor([[0, 1, 1, 1]]),
        past_key_values=StaticCache(config=model.config, max_cache_len=8),
        cache_position=torch.arange(4),
        batch_size=1,
        sequence_length=4,
        position_ids=None,
    )
    assert mask.shape == (1, 1, 4, 8)


class _PromptConfig:
    def __init__(self, peft_type: PeftType, **given) -> None:
        self.peft_type = peft_type
        self.num_layers = self.token_dim = self.num_attention_heads = self.encoder_hidden_size = None
        vars(self).update(given)


def test_prompt_dimensions():
    base = {"n_layer": 2, "hidden_size": 8, "n_head": 4, "num_key_value_heads": 2}
    prompt = _prepare_prompt_learning_config(_PromptConfig(PeftType.PROMPT_TUNING), base)
    assert (prompt.num_layers, prompt.token_dim, prompt.num_attention_heads, prompt.encoder_hidden_size) == (
        2,
        8,
        4,
        8,
    )
    prefix = _prepare_prompt_learning_config(_PromptConfig(PeftType.PREFIX_TUNING), {"text_config": base})
    assert (prefix.token_dim, prefix.num_attention_heads) == (4, 2)
    assert _prepare_prompt_learning_config(_PromptConfig(PeftType.P_TUNING, token_dim=3), base).token_dim == 3
    with pytest.raises(ValueError, match=r"token_dim is not set .* hidden_size"):
        _prepare_prompt_learning_config(_PromptConfig(PeftType.P_TUNING), {"n_layer": 2})


def test_fsdp_policy_wraps_blocks_and_adapters(monkeypatch):
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    policy = other.fsdp_auto_wrap_policy(model)

    def wrapped():
        return {
            name.rpartition("model.")[2]
            for name, module in model.named_modules()
            if policy(module=module, recurse=False, nonwrapped_numel=0)
        }

    names = wrapped()
    assert "layers.0" in names
    assert {name for name in names if "lora_" in name} == {
        f"layers.0.self_attn.{layer}.lora_{factor}.default" for layer in ("q_proj", "v_proj") for factor in "AB"
    }
    assert len(names) == 5
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    policy = other.fsdp_auto_wrap_policy(model)
    assert "layers.0.mlp" in wrapped()
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
    with pytest.raises(ValueError, match="'Nothing'"):
        other.fsdp_auto_wrap_policy(model)


def test_file_on_hub(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert other.check_file_exists_on_hf_hub(str(tmp_path), "config.json") is True
    assert other.check_file_exists_on_hf_hub(str(tmp_path), "other.json") is False
    assert other.check_file_exists_on_hf_hub("some/repo", "config.json") is None  # offline in tests
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("peft.utils.other.calls.file_exists", unreachable)
    with pytest.warns(UserWarning, match="no route"):
        assert other.check_file_exists_on_hf_hub("some/repo", "config.json") is None
    monkeypatch.setattr("peft.utils.other.calls.file_exists", lambda *args, **kwargs: True)
    assert other.check_file_exists_on_hf_hub("some/repo", "config.json") is True
