# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Tiny base models and adapters for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peft import LoraConfig, PeftModel, get_peft_model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes, **options)).eval()


def bert_config() -> BertConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=3, **sizes)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)).eval()


def lora(**options: Any) -> LoraConfig:
    """A config whose adapter changes the output from the start."""
    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options})


def adapted(**options: Any) -> PeftModel:
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, lora(**options)).eval()


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


def trained(model: nn.Module) -> set[str]:
    """Names of the adapters that have a parameter with requires_grad."""
    return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
