# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Recipes for what is written beside the adapter itself and where, and for adapters in models without a wrapper."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from options import BASES
from recipes import evaluated, fill, recipe, saved_files
from safetensors.torch import save_file
from torch import nn

import peft
from peft import functional

_IDS = torch.tensor([[5, 3, 9, 1, 7, 2]])


# ---- files -----------------------------------------------------------------------------------------------------------
@recipe
def published_base(folder: str) -> None:
    """Write a base model, whose vocabulary tells whether another was resized."""
    torch.manual_seed(0)
    BASES["llama"]().save_pretrained(folder)


def _base(published: str, vocabulary: int) -> nn.Module:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(published).eval()
    if vocabulary:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    return base


@recipe
def embeddings_written(
    published: str, folder: str, vocabulary: int, save_embedding_layers: bool | str, adapters: int, options: dict
) -> dict[str, Any]:
    """What a folder holds of adapters of a base whose vocabulary was resized, and the output."""
    model = peft.get_peft_model(_base(published, vocabulary), peft.LoraConfig(r=2, **options))
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", peft.LoraConfig(r=2, **options))
    fill(model)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    with evaluated(model):
        return {"saved": saved_files(folder), "y": model(input_ids=_IDS).logits}


@recipe
def embeddings_read(published: str, folder: str, vocabulary: int) -> dict[str, Any]:
    """The output of a fresh base with what a folder holds."""
    model = peft.PeftModel.from_pretrained(_base(published, vocabulary), folder, adapter_name="mine")
    with evaluated(model):
        return {"y": model(input_ids=_IDS).logits}


@recipe
def written_elsewhere(published: str, folder: str, safe: bool) -> dict[str, Any]:
    """The files of an adapter in a folder below a folder, in either format, and the output."""
    options = {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(_base(published, 0), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    fill(model)
    model.save_pretrained(Path(folder, "some", "where"), safe_serialization=safe)
    with evaluated(model):
        return {
            "files": sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()),
            "y": model(input_ids=_IDS).logits,
        }


@recipe
def read_elsewhere(published: str, folder: str, by: str) -> dict[str, Any]:
    """The output of the model that each way of loading makes of it."""
    where = {"subfolder": "some/where"}
    config = peft.PeftConfig.from_pretrained(folder, **where)
    if by == "auto":
        config.base_model_name_or_path = published
        model = peft.AutoPeftModelForCausalLM.from_pretrained(f"{folder}/some/where", config=config)
    elif by == "second":
        model = peft.get_peft_model(_base(published, 0), peft.LoraConfig(r=3, target_modules=["k_proj"]))
        model.load_adapter(folder, "mine", **where)
        model.set_adapter("mine")
    else:
        model = peft.PeftModel.from_pretrained(_base(published, 0), folder, config=config, **where)
    with evaluated(model):
        return {"y": model(input_ids=_IDS).logits}


@recipe
def biases_written(bias: str) -> dict[str, Any]:
    """What is trained and saved besides the factors where an attention and a linear layer are adapted."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["attention", "head"], bias=bias)
    model = peft.get_peft_model(BASES["attention"](), config)
    return {
        "trained": sorted(name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name),
        "saved": sorted(key for key in peft.get_peft_model_state_dict(model) if "lora_" not in key),
    }


# ---- without a wrapper -----------------------------------------------------------------------------------------------
def _trained(model: nn.Module) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


@recipe
def without_wrapper(dora: bool) -> dict[str, Any]:
    """What the functions of `peft.functional` do to a model that two adapters were injected into."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    options = {"r": 2, "use_dora": dora, "init_lora_weights": False}
    functional.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "1"], **options), model, "a")
    functional.inject_adapter_in_model(peft.LoraConfig(target_modules=["1"], **options), model, "b")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    out: dict[str, Any] = {}
    for name, active, inference in (("b", "b", False), ("both", ["a", "b"], False), ("a", "a", True)):
        functional.set_adapter(model, active, inference_mode=inference)
        out[name] = [model(x), _trained(model)]
    functional.set_requires_grad(model, ["a", "b"], True)
    out["thawed"] = _trained(model)
    saved = functional.get_peft_model_state_dict(model, adapter_name="a")
    out["saved"] = {key: list(value.shape) for key, value in saved.items()}
    result = functional.set_peft_model_state_dict(model, {key: 2 * value for key, value in saved.items()}, "a")
    out["unexpected"], out["doubled"] = list(result.unexpected_keys), model(x)
    functional.set_adapter(model, "b")
    out["left"] = functional.delete_adapter(model, "a", "lora_")
    out["after"] = [model(x), sorted(name for name, _ in model.named_parameters())]
    functional.cast_adapter_dtype(model.half(), "b", True)
    out["dtypes"] = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
    return out


@recipe
def helpers_asked(folder: str) -> dict[str, Any]:
    """What `peft.helpers` says of folders, signatures and scalings that cannot be."""
    import inspect

    from peft import helpers

    model = peft.get_peft_model(BASES["llama"](), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    out: dict[str, Any] = {
        "adapter": helpers.check_if_peft_model(folder), "nothing": helpers.check_if_peft_model(f"{folder}/nothing"),
    }  # fmt: skip
    for key, call in {
        "text": lambda: helpers.rescale_adapter_scale(model, "2").__enter__(),
        "no adapter": lambda: helpers.rescale_adapter_scale(BASES["llama"](), 2.0).__enter__(),
        "unknown": lambda: helpers.update_signature(model, "backward"),
    }.items():
        try:
            out[key] = type(call()).__name__
        except (TypeError, ValueError) as error:
            out[key] = type(error).__name__
    helpers.update_signature(model, "all")
    for method in ("forward", "generate"):
        out[method] = list(inspect.signature(getattr(model, method)).parameters)
    return out


# ---- layouts of transformers 4 ---------------------------------------------------------------------------------------
_SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
_EXPERTS = "block_sparse_moe.experts"
_FORMER = {
    "q_proj": ("self_attn.q_proj", 16, 16), "gate": ("block_sparse_moe.gate", 3, 16), "w1": (_EXPERTS, 32, 16),
    "w2": (_EXPERTS, 16, 32), "w3": (_EXPERTS, 32, 16),
}  # fmt: skip


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=3, **_SIZES)).eval()


def _llava() -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 8}
    vision |= {"patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(text_config={"model_type": "llama", **_SIZES}, vision_config=vision)
    return LlavaForConditionalGeneration(config).eval()


def _former_names(model: str, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Names of the adapted modules as transformers 4 had them, with their output and input features."""
    if model == "llava":
        layers = [f"language_model.model.layers.{i}.self_attn" for i in range(2)]
        return {f"{layer}.{name}": (8 if name == "v_proj" else 16, 16) for layer in layers for name in targets}
    names = {}
    for layer in range(2):
        for target in targets:
            inner, out, features = _FORMER[target]
            single = [f"{inner}.{expert}.{target}" for expert in range(3)] if inner == _EXPERTS else [inner]
            names.update({f"model.layers.{layer}.{name}": (out, features) for name in single})
    return names


@recipe
def former_layout(folder: str, model: str, targets: list[str], **options: Any) -> dict[str, Any]:
    """The output of a model with an adapter that was written where transformers 4 was installed, and its names now."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (out, features) in _former_names(model, targets).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, features, generator=generator) / 3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator) / 3
    Path(folder).mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets, **options}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, Path(folder, "adapter_model.safetensors"))
    base = {"mixtral": _mixtral, "llava": _llava}[model]()
    plain = base(input_ids=_IDS).logits
    if model == "mixtral":
        truth = _written_in(base, tensors, 6 / (2**0.5 if options.get("use_rslora") else 2))(input_ids=_IDS).logits
    loaded = peft.PeftModel.from_pretrained(base, folder)
    with evaluated(loaded):
        y = loaded(input_ids=_IDS).logits
    off = 0.0 if model == "llava" else (y - truth).abs().max().item()
    return {
        "y": y,
        "right": off < 1e-5 and bool((y - plain).abs().max() > 1e-4),
        "names": sorted(peft.get_peft_model_state_dict(loaded)),
    }


def _written_in(base: nn.Module, tensors: dict[str, torch.Tensor], scaling: float) -> nn.Module:
    """A copy of a Mixtral whose weights have the updates of an adapter in the former layout in them."""
    base = copy.deepcopy(base)
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        delta = scaling * tensors[key.replace("lora_A", "lora_B")] @ a
        parts = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
        block, name = base.model.layers[int(parts[2])], parts[-1]
        with torch.no_grad():
            if name == "q_proj":
                block.self_attn.q_proj.weight += delta
            elif name == "gate":
                block.mlp.gate.weight += delta
            elif name == "w2":
                block.mlp.experts.down_proj[int(parts[-2])] += delta
            else:  # w1 and w3 are the halves of one
                half = slice(0, 32) if name == "w1" else slice(32, 64)
                block.mlp.experts.gate_up_proj[int(parts[-2]), half] += delta
    return base
