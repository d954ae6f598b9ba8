# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""transformers' own way to load adapters, and adapters saved under names or layouts that transformers has changed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

core = pytest.importorskip("transformers.core_model_loading", reason="needs transformers 5")

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402

from peft import (  # noqa: E402
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.transformers_weight_conversion import (  # noqa: E402
    FlattenDims,
    PeftConcatenate,
    PermuteDims,
    build_peft_weight_mapping,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
IDS = torch.arange(6)[None]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=3)).eval()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


# ---- transformers' own methods -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"bias": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["two", "default", "lora_x"])
def test_add_save_and_load(tmp_path, settings, name):
    model = llama()
    model.add_adapter(LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = llama()
    info = loaded.load_adapter(tmp_path, name)
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    assert loaded.active_adapters() == [name]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_peft_model_of_another_class_is_read(tmp_path, settings):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(tmp_path)
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_the_base_model_is_saved_under_its_own_names_afterwards(tmp_path):
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = llama()
    loaded.load_adapter(tmp_path / "adapter", "two")
    loaded.delete_adapter("two")
    loaded.save_pretrained(tmp_path / "base")
    names = [key.replace(".base_layer.", ".") for key in load_file(tmp_path / "base" / "model.safetensors")]
    assert sorted(names) == sorted(llama().state_dict())


def test_names_are_mapped_without_conversions_too():
    for conversions in ([], None):
        renamings = build_peft_weight_mapping(conversions, "two", peft_config=LoraConfig())
        for saved, live in (
            ("base_model.model.a.lora_A.weight", "a.lora_A.two.weight"),
            ("base_model.model.a.lora_embedding_A", "a.lora_embedding_A.two"),
            ("base_model.model.a.lora_magnitude_vector", "a.lora_magnitude_vector.two.weight"),
            ("base_model.model.lora_stack.a.lora_B.bias", "lora_stack.a.lora_B.two.bias"),
            ("base_model.model.head.weight", "head.weight"),
        ):
            assert core.apply_renamings(saved, renamings) == live
    assert core.apply_renamings("a.trainable_tokens_delta", build_peft_weight_mapping([], "two")) == (
        "a.trainable_tokens_delta.two"
    )


# ---- renamed modules -----------------------------------------------------------------------------------------------
def test_an_adapter_with_former_names_is_loaded():
    config = LlavaConfig(
        text_config={"model_type": "llama", **SIZES, **HEADS},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 8}
        | {"patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    model = get_peft_model(LlavaForConditionalGeneration(config), LoraConfig(r=2, target_modules=["q_proj"]))
    state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    new = "base_model.model.model.language_model.layers"
    assert any(key.startswith(new) for key in state)
    former = {key.replace(new, "base_model.model.language_model.model.layers"): value for key, value in state.items()}
    result = set_peft_model_state_dict(model, former)
    assert not result.missing_keys and not result.unexpected_keys
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(now[key], state[key]) for key in state)


# ---- experts -------------------------------------------------------------------------------------------------------
def per_expert(targets: tuple[str, ...], rank: int = 2) -> dict[str, torch.Tensor]:
    """An adapter as transformers 4 laid Mixtral out: one module for each layer of each expert."""
    shapes = {"w1": (32, 16), "w2": (16, 32), "w3": (32, 16)}
    state = {}
    for layer in range(2):
        for expert in range(3):
            for name in targets:
                prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                state[f"{prefix}.lora_A.weight"] = torch.randn(rank, shapes[name][1])
                state[f"{prefix}.lora_B.weight"] = torch.randn(shapes[name][0], rank)
    return state


def dense(a: torch.Tensor, b: torch.Tensor, experts: int = 3) -> torch.Tensor:
    """What A `[experts · r, in]` and B `[out, r · experts]` add to a stacked parameter `[experts, out, in]`."""
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts)
    return torch.einsum("ore,eri->eoi", b, a)


@pytest.mark.parametrize("targets", [("w1", "w2", "w3"), ("w2",), ("w1", "w3")], ids=str)
def test_experts_are_fused_without_changing_what_they_add(targets):
    state = per_expert(targets)
    config = LoraConfig(r=2, target_modules=list(targets))
    fused = convert_peft_adapter_state_dict_for_transformers(mixtral(), config, state)
    assert len(fused) == 2 * 2 * (("w2" in targets) + ("w1" in targets))
    for layer in range(2):
        experts = f"base_model.model.model.layers.{layer}.mlp.experts"
        inner = f"{experts}.base_layer" if len(targets) == 3 else experts
        parts = [(experts, ("w2",))] if "w2" in targets else []
        parts += [(inner, ("w1", "w3"))] if "w1" in targets else []
        for module, names in parts:
            delta = dense(fused[f"{module}.lora_A.weight"], fused[f"{module}.lora_B.weight"])
            for expert in range(3):
                old = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
                expected = [state[f"{old}.{n}.lora_B.weight"] @ state[f"{old}.{n}.lora_A.weight"] for n in names]
                torch.testing.assert_close(delta[expert], torch.cat(expected))


def qwen2_moe():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(vocab_size=32, num_key_value_heads=1, shared_expert_intermediate_size=12, **sizes, **experts)
    ).eval()


def test_experts_of_a_file_are_adapted_where_names_mean_other_layers(tmp_path):
    """Qwen2-MoE, whose shared expert has layers of the experts' names: the file says which ones were adapted."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    fresh = get_peft_model(qwen2_moe(), config)
    state = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(fresh).items()}
    assert len(state) == 6 and all("shared_expert" in key for key in state)
    experts, expected = "base_model.model.model.layers.0.mlp.experts", qwen2_moe()
    block = expected.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(3):
            out, features = (16, 8) if name == "down_proj" else (8, 16)
            state[f"{experts}.{expert}.{name}.lora_A.weight"] = torch.randn(2, features)
            state[f"{experts}.{expert}.{name}.lora_B.weight"] = torch.randn(out, 2)
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")

    def added(path):
        return state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]

    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            block.shared_expert.get_submodule(name).weight += added(
                f"{experts.removesuffix('experts')}shared_expert.{name}"
            )
        for expert in range(3):
            parts = [added(f"{experts}.{expert}.{name}") for name in ("gate_proj", "up_proj", "down_proj")]
            block.experts.gate_up_proj[expert] += torch.cat(parts[:2])
            block.experts.down_proj[expert] += parts[2]
    ids = torch.tensor([[5, 3, 9, 1]])
    model = PeftModel.from_pretrained(qwen2_moe(), tmp_path)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    again = get_peft_model(qwen2_moe(), LoraConfig(target_modules=["q_proj"]))
    again.load_adapter(tmp_path, "saved")
    again.set_adapter("saved")
    torch.testing.assert_close(again(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


CONVERTED = [
    (["w1", "w2", "w3"], {}, (set(), ["gate_up_proj", "down_proj"], {r".*\.gate_up_proj": 4}, 16)),
    (["q_proj", "w2"], {}, ({"q_proj"}, ["down_proj"], {}, None)),
    (["w1", "w3"], {"rank_pattern": {"w1": 3, "w3": 3}}, (set(), ["gate_up_proj"], {r".*\.gate_up_proj": 6}, 16)),
    (["w1", "w3"], {"use_rslora": True}, (set(), ["gate_up_proj"], {r".*\.gate_up_proj": 4}, 8 * 2**0.5)),
    (["gate", "w2"], {}, (set(), ["down_proj", "gate.weight"], {}, None)),
    (
        ["w2"],
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        (set(), ["model.layers.1.mlp.experts.down_proj"], {}, None),
    ),
    (r".*\.experts\.\d+\.w2", {}, (r".*\.experts\.\d+\.w2", ["down_proj"], {}, None)),
    (["q_proj"], {}, ({"q_proj"}, [], {}, None)),
]


def test_stacked_experts_have_no_default_targets():
    with pytest.raises(NoMatchingPeftModuleError, match="MixtralForCausalLM.*set target_modules or target_parameters"):
        get_peft_model(mixtral(), LoraConfig())


@pytest.mark.parametrize(("targets", "settings", "expected"), CONVERTED, ids=str)
def test_configs_of_single_experts(targets, settings, expected):
    model = mixtral()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, **settings)
    for _ in range(2):  # a converted config stays as it is
        convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
        modules, parameters, ranks, alpha = expected
        assert config.target_modules == modules and config.target_parameters == parameters
        assert {key: rank for key, rank in config.rank_pattern.items() if "gate_up" in key} == ranks
        assert config.alpha_pattern.get(r".*\.gate_up_proj") == alpha


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (["w1"], {}, "w3"),
        (["w1", "w3"], {"rank_pattern": {"w1": 4}}, "rank_pattern"),
        (r".*\.experts\.0\.w2", {}, r"experts\.1\.w2"),
    ],
    ids=str,
)
def test_configs_that_adapt_a_part_of_what_became_one(targets, settings, message):
    model = mixtral()
    with pytest.raises(ValueError, match=message):
        convert_peft_config_for_transformers(
            LoraConfig(target_modules=targets, **settings), model, get_model_conversion_mapping(model)
        )


def test_operations_and_their_inverses():
    tensor = torch.randn(2, 3, 4)
    call = {"source_patterns": ["a"], "target_patterns": ["b"], "config": None}
    there = PermuteDims(dims=(2, 0, 1)).convert({"a": tensor}, **call)["a"]
    assert there.shape == (4, 2, 3)
    assert torch.equal(PermuteDims(dims=(2, 0, 1)).reverse_op.convert({"a": there}, **call)["a"], tensor)
    assert FlattenDims(dims=(0, 1)).convert({"a": tensor}, **call)["a"].shape == (6, 4)
    for operation in (FlattenDims(dims=(0, 1)), PeftConcatenate(dim=1)):
        with pytest.raises(ValueError, match="cannot be undone"):
            _ = operation.reverse_op
