# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Recipes for X-LoRA, with experts called 0, 1, 2: upstream's release runs with no other names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from recipes import backward, evaluated, fill, recipe, saved_files, trainable
from torch import nn

import peft

_IDS = torch.tensor([[5, 3, 9, 1], [7, 2, 4, 8]])


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, use_cache=False, **sizes)).eval()


@recipe
def xlora_experts(folder: str) -> None:
    for i in range(3):
        config = peft.LoraConfig(r=2 + i, lora_alpha=2 * i + 3, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(_llama(), config)
        fill(model, str(i))
        model.save_pretrained(Path(folder, str(i)))


@recipe
def xlora(experts: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Start, outputs, weights and gradients of the classifier, and what is saved of it."""
    base = _llama()
    torch.manual_seed(7)
    adapters = {str(i): str(Path(experts, str(i))) for i in range(3)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters, **options)
    model = peft.get_peft_model(base, config)
    own = {name: p for name, p in trainable(model).items() if "classifier" in name}
    out: dict[str, Any] = {"start": {name: p.detach().clone() for name, p in own.items()}}
    fill(model)
    model.eval()
    y = model(input_ids=_IDS).logits
    grads = {name: grad for name, grad in backward(model, y).items() if "classifier" in name}
    out |= {"y": y, "scalings": model.base_model.get_latest_scalings(), "grads": grads}
    with evaluated(model), model.disable_adapter():
        out["disabled"] = model(input_ids=_IDS).logits
    mask = torch.ones_like(_IDS)
    out["generated"] = model.generate(input_ids=_IDS, attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    model.save_pretrained(folder)
    saved = saved_files(folder)
    return {
        **out,
        "config": saved["configs"]["adapter_config.json"],
        "tensors": saved["tensors"]["adapter_model.safetensors"],
    }


@recipe
def xlora_loaded(folder: str) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(_llama(), folder)
    with evaluated(model):
        return model(input_ids=_IDS).logits


@recipe
def xlora_kept() -> bool:
    """Whether the classifier's first layer is in the file."""
    with tempfile.TemporaryDirectory() as experts, tempfile.TemporaryDirectory() as folder:
        xlora_experts(experts)
        saved = xlora(experts=experts, folder=folder, options={})["tensors"]
    return "base_model.internal_xlora_classifier.layers.0.weight" in saved
