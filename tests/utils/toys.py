# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Tiny models that the tests of utils share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration


class Toy(nn.Module):
    """Embedding, body and head, without a config."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8, bias=bias)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.emb(ids))))

    def get_input_embeddings(self) -> nn.Module:
        return self.emb


def llama(tied: bool = False, dtype: torch.dtype = torch.float32, hidden_size: int = 16) -> LlamaForCausalLM:
    """A language model with a vocabulary of 32."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def t5() -> T5ForConditionalGeneration:
    """An encoder-decoder whose four embeddings are one tensor."""
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()
