# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Recipes for DoRA where upstream's release refuses it, and for adapters of layers that share a weight."""

from __future__ import annotations

import torch
from recipes import evaluated, fill, recipe
from torch import nn

import peft


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.up.transpose(1, 2)).sum(0)


class _Attention(nn.MultiheadAttention):
    """Attention whose keys and values are the first features of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x[..., : self.kdim], x[..., : self.vdim], need_weights=False)[0]


_BODIES = {
    "experts": _Experts,
    "packed": lambda: _Attention(8, 2),
    "separate": lambda: _Attention(8, 2, kdim=6, vdim=4),
    "lora_bias": lambda: nn.Linear(8, 6),
}


@recipe
def dora_merged(kind: str) -> float:
    """How much merging changes the output of DoRA on a layer, over how much the adapter does."""
    torch.manual_seed(0)
    base = nn.Sequential(_BODIES[kind]())
    where = {"target_parameters": ["0.up"], "target_modules": []} if kind == "experts" else {"target_modules": ["0"]}
    config = peft.LoraConfig(r=2, use_dora=True, lora_bias=kind == "lora_bias", **where)
    model = peft.get_peft_model(base, config)
    fill(model)
    x = torch.randn(3, 5, 8) if kind != "experts" else torch.randn(5, 8)
    with evaluated(model):
        with model.disable_adapter():
            plain = model(x)
        before = model(x)
        assert not torch.allclose(before, plain)
        model.merge_adapter()
        return ((model(x) - before).abs().max() / (before - plain).abs().max()).item()


@recipe
def mixed_rows(kind: str, use_dora: bool = False) -> float:
    """How far rows of a mixed batch are from the same rows in batches of one adapter."""
    torch.manual_seed(0)
    where = {"target_parameters": ["0.up"], "target_modules": []} if kind == "experts" else {"target_modules": ["0"]}
    config = peft.LoraConfig(r=2, use_dora=use_dora, **where)
    model = peft.get_peft_model(nn.Sequential(_BODIES[kind]()), config, "a")
    model.add_adapter("b", config)
    fill(model)
    # attention here has the batch second
    x = torch.randn(5, 2, 8) if kind != "experts" else torch.randn(2, 8)
    rows = 1 if kind != "experts" else 0
    with evaluated(model):
        mixed = model(x, adapter_names=["a", "b"])
        alone = model(x).select(rows, 0)
        model.set_adapter("b")
        other = model(x).select(rows, 1)
    found = torch.stack([mixed.select(rows, 0) - alone, mixed.select(rows, 1) - other])
    return (found.abs().max() / mixed.abs().max()).item()


@recipe
def dora_on_activated_tokens() -> float:
    """The largest change that an aLoRA adapter with DoRA makes before its invocation tokens."""
    model, ids = _llama(target_modules=["v_proj"], use_dora=True, alora_invocation_tokens=[3, 4])
    fill(model)
    with evaluated(model):
        changed = model(input_ids=ids).logits
        with model.disable_adapter():
            change = (changed - model(input_ids=ids).logits).abs().amax((0, 2))
    assert change[2:].min() > 0
    return change[:2].max().item()


@recipe
def tied_merge() -> float:
    """How much merging the adapter of two layers that share a weight changes the output."""
    model, ids = _llama(True, target_modules=["embed_tokens"], ensure_weight_tying=True)
    fill(model)
    with evaluated(model):
        before = model(input_ids=ids).logits
        model.merge_adapter()
        return ((model(input_ids=ids).logits - before).abs().max() / before.abs().max()).item()


def _llama(tied: bool = False, **options: object) -> tuple[nn.Module, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, tie_word_embeddings=tied, **sizes))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, **options)), torch.tensor([[1, 2, 3, 4, 5, 6]])
