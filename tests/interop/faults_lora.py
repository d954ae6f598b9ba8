# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Recipes that show upstream's faults in the rest of the LoRA family: starts, attention, tied and repeated layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from options import base_and_input
from recipes import adapted, evaluated, fill, recipe, row_of
from safetensors.torch import save_file
from torch import nn

import peft


def _of_base(name: str, filled: bool = True, **options: Any) -> tuple[Any, torch.Tensor]:
    """A model of `options.BASES` with an adapter, and an input."""
    base, x = base_and_input(name)
    torch.manual_seed(7)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    if filled:
        fill(model)
    return model, x


def _change(model: Any, x: torch.Tensor) -> float:
    """The largest change that merging makes, in parts of the largest output."""
    with evaluated(model):
        before, after = model(x), None
        model.merge_adapter()
        after = model(x)
        if not isinstance(before, torch.Tensor):
            before, after = before.logits, after.logits
        return ((after - before).abs().max() / before.abs().max()).item()


@recipe
def olora_on_conv1d() -> float:
    """How far the output is from the base's when OLoRA starts on a Conv1D that is not square."""
    row = row_of("transformers_conv1d", "fp32", "lora")
    x = row.layer.input(row.form)
    expected = row.layer.model(row.form)(x)
    return (adapted(row, filled=False, init_lora_weights="olora")(x) - expected).abs().max().item()


@recipe
def attention_keeps_its_bits(passes: int = 4) -> bool:
    """Whether the packed weight of an attention is bit for bit the same after some forward passes."""
    model, x = _of_base("attention", target_modules=["attention"])
    weight = model.base_model.model.attention.get_base_layer().in_proj_weight
    before = weight.detach().clone()
    with evaluated(model):
        for _ in range(passes):
            model(x)
    return torch.equal(model.base_model.model.attention.get_base_layer().in_proj_weight, before)


@recipe
def attention_counts_once() -> float:
    """How far an attention with an adapter is from one whose weights have both updates in them, once."""
    model, x = _of_base("attention", target_modules=["attention"])
    plain, _ = base_and_input("attention")
    layer = model.base_model.model.attention
    with evaluated(model):
        plain.attention.in_proj_weight.add_(layer.get_delta_weight("default"))
        plain.attention.out_proj.weight.add_(layer.base_layer.out_proj.get_delta_weight("default"))
        return (model(x) - plain(x)).abs().max().item()


@recipe
def change_by_merging_shared(kind: str, **options: Any) -> float:
    """The change that merging makes where layers share their weights: repeated ones, or tied ones."""
    return _change(*_of_base("llama" if kind == "replication" else "llama-tied", task_type="CAUSAL_LM", **options))


@recipe
def tied_after_a_move() -> bool:
    """Whether adapters of tied layers are still one after the model was moved to another dtype."""
    model, _ = _of_base("llama-tied", task_type="CAUSAL_LM", target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = model.double()
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    with torch.no_grad():
        embedding.lora_embedding_B["default"].add_(1)
    return torch.equal(embedding.lora_embedding_B["default"].t(), head.lora_A["default"].weight)


def _block_diagonal(base: str, **options: Any) -> Any:
    blocks = peft.BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2)
    return _of_base(base, target_modules=["first", "second"], use_bdlora=blocks, **options)[0]


@recipe
def block_diagonal_delta() -> list[int]:
    """The shape of the update by a block-diagonal A on a layer `[128, 64]`."""
    return list(_block_diagonal("two").base_model.model.first.get_delta_weight("default").shape)


@recipe
def block_diagonal_random() -> bool:
    """Whether a block-diagonal B starts at random where init_lora_weights=False."""
    model = _block_diagonal("two", filled=False, init_lora_weights=False)
    return bool((model.base_model.model.second.lora_B["default"].weight != 0).all())


@recipe
def block_diagonal_on_four_bits() -> list[int]:
    """The shape of a block-diagonal A on a 4-bit layer of 64 input features, in two blocks."""
    return list(_block_diagonal("two-nf4").base_model.model.first.lora_A["default"].weight.shape)


@recipe
def kasa_on_four_bits() -> bool:
    """Whether KaSA's diagonal is there on 4-bit layers."""
    model, _ = _of_base("two-nf4", target_modules=["first"], kasa_config=peft.KasaConfig())
    return any("lora_diag" in name for name, _ in model.named_parameters())


@recipe
def embedding_by_lorafa() -> bool:
    """Whether LoRA-FA trains a fresh adapter of an embedding, whose A starts at zero."""
    from peft.optimizers import create_lorafa_optimizer

    model, x = _of_base("embedded", filled=False, target_modules=["0", "1"])
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return bool((model.base_model.model[0].get_delta_weight("default") != 0).any())


@recipe
def names_of_biases() -> list[str]:
    """Under which names the biases of an adapter are saved, of whose two layers another adapter wraps the second."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], bias="all")
    )
    model.add_adapter("other", peft.LoraConfig(target_modules=["1"]))
    return sorted(key for key in peft.get_peft_model_state_dict(model) if "bias" in key)


def _apart_when_read(model: peft.PeftModel, x: torch.Tensor, base: str, tensors: dict[str, torch.Tensor]) -> float:
    """How far an adapter whose file holds `tensors` is, once it is loaded, from `model`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        loaded = peft.PeftModel.from_pretrained(base_and_input(base)[0], folder)
    with evaluated(model), evaluated(loaded):
        return (model(x) - loaded(x)).abs().max().item()


@recipe
def biases_of_an_old_file() -> float:
    """How far an adapter with trained biases is from what it was, its file named as releases 0.4 to 0.6 did."""
    model, x = _of_base("two", target_modules=["first"], bias="lora_only")
    tensors = {key.replace(".base_layer.", "."): value for key, value in peft.get_peft_model_state_dict(model).items()}
    return _apart_when_read(model, x, "two", tensors)


@recipe
def experts_from_a_state_dict() -> float:
    """How far a model is, whose adapters of bare parameters were injected from a saved adapter, from the saved one."""
    where = {"target_modules": ["last"], "target_parameters": ["experts.up", "experts.down"]}
    config = peft.LoraConfig(r=2, init_lora_weights=False, **where)
    base, x = base_and_input("mixture")
    model = peft.inject_adapter_in_model(config, base)
    saved = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(config, base_and_input("mixture")[0], state_dict=saved)
    peft.set_peft_model_state_dict(other, saved)
    with evaluated(model), evaluated(other):
        return (model(x) - other(x)).abs().max().item()


@recipe
def experts_of_an_older_file() -> float:
    """How far adapters of stacked experts are from what they were, A and B stored as releases 0.17 to 0.19.0 did."""
    where = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
    model, x = _of_base("mixture", **where)
    state = peft.get_peft_model_state_dict(model)
    n = len(model.base_model.model.experts.get_param())
    for key in [key for key in state if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        a, b = state[key].unflatten(0, (n, -1)), state[other].unflatten(1, (-1, n))
        state[key] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
        state[other] = a.permute(2, 1, 0).flatten(1, 2).contiguous()
    return _apart_when_read(model, x, "mixture", state)


@recipe
def converted_dora(start: str) -> float:
    """How far a trained DoRA adapter, written for the base that its start left, is from what it was."""
    options = {"target_modules": ["first", "second"], "use_dora": True}
    model, x = _of_base("two", filled=False, init_lora_weights=start, **options)
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(f"{folder}/start")
        model.peft_config["default"].init_lora_weights = start
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.2)
        model.save_pretrained(f"{folder}/plain", path_initial_model_for_weight_conversion=f"{folder}/start")
        loaded = peft.PeftModel.from_pretrained(base_and_input("two")[0], f"{folder}/plain")
    with evaluated(model), evaluated(loaded):
        return (model(x) - loaded(x)).abs().max().item()


@recipe
def named_shared_experts(targets: Any) -> list[str]:
    """The children of a GLM4-MoE's MLPs, one dense and one of experts, that an adapter is for."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    base = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **heads, **experts, pad_token_id=0))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    adapted = {name.split(".")[6] for name in peft.get_peft_model_state_dict(model)}
    return sorted(adapted)


@recipe
def left_by_unload() -> bool:
    """Whether `unload` gives the base model back where an adapter was merged."""
    model, x = _of_base("two", target_modules=["first"])
    with model.disable_adapter():
        before = model(x)
    model.merge_adapter()
    return torch.allclose(model.unload()(x), before, atol=1e-5)


@recipe
def activated_without_a_task() -> bool:
    """Whether aLoRA acts in a model whose config names no task."""
    model, ids = _of_base("llama", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[3])
    ids = torch.cat([ids, torch.full_like(ids[:, :1], 3), ids], 1)
    with evaluated(model):
        y = model(ids).logits
        with model.disable_adapter():
            return not torch.equal(y, model(ids).logits)


@recipe
def made_without_memory(**options: Any) -> bool:
    """Whether an adapter made with low_cpu_mem_usage leaves every tensor of the base with its values."""
    base, _ = base_and_input("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], **options), low_cpu_mem_usage=True)
    return not any(p.is_meta for name, p in model.named_parameters() if "lora_" not in name)


@recipe
def thawing_nothing() -> str:
    """The error that thawing an adapter that is not there raises; empty if none."""
    model, _ = _of_base("two", target_modules=["first"])
    try:
        model.set_requires_grad("absent", False)
    except ValueError as error:
        return type(error).__name__
    return ""


@recipe
def mixed_norms() -> bool:
    """Whether rows of a batch use copies of a norm in `modules_to_save`."""
    model, ids = _of_base("llama", target_modules=["q_proj"], modules_to_save=["model.norm"])
    ids = ids[:1].expand(2, -1)
    with evaluated(model):
        first, second = model(ids, adapter_names=["default", "__base__"]).logits
        return torch.allclose(first, model(ids).logits[0], atol=1e-5) and not torch.allclose(first, second, atol=1e-3)
