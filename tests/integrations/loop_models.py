# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A Llama of a few thousand parameters, whole or in NF4, with adapters and a tokenizer, for other people's loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

VOCAB = 32
IDS = torch.arange(96).reshape(6, 16) % VOCAB
DATA = [{"input_ids": row, "labels": row} for row in IDS]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def llama(quantised: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """A causal model of two layers, the same one at every call; `quantised` puts all but the head into NF4."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, **options)).to(dtype)
    return in_nf4(model, dtype) if quantised else model


def in_nf4(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put the linear layers of a model, its head excepted, into NF4."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            sizes = module.in_features, module.out_features
            layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def dora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "use_dora": True, **options})


def adapted(quantised: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """The Llama with a DoRA adapter on all its linear layers, the same one at every call."""
    model = llama(quantised, dtype)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return get_peft_model(model, dora(task_type="CAUSAL_LM", **options))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0 to w28 after the three special ones, and a chat template that writes contents alone."""
    tokenizers = pytest.importorskip("tokenizers")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{i}" for i in range(VOCAB - len(special)))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    words_to_ids = tokenizers.Tokenizer(model)
    words_to_ids.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids, chat_template=TEMPLATE, **special)


COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
    "seed": 0,
    "logging_steps": 1,
}


def arguments(folder: Any, kind: type = TrainingArguments, **options: Any) -> Any:
    """Training arguments of one kind, logging at each step."""
    return kind(output_dir=str(folder), **{**COMMON, **options})


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
