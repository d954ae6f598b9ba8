# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The whole-model cases that both sides run: tiny transformers models with random weights, and what is asked of LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCAB = 32
_IDS = torch.tensor([[5, 3, 9, 1, 7, 2], [4, 4, 8, 30, 6, 2]])


def _llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, **sizes, **options))


def _llama_classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB, num_labels=3, pad_token_id=0, **sizes))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def _bert(head: str, num_labels: int = 3) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=16, num_labels=num_labels, **sizes)
        return getattr(transformers, head)(config)

    return build


def _mixture(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        experts = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
        widths = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
        config = AutoConfig.for_model(kind, vocab_size=VOCAB, num_key_value_heads=1, **sizes, **experts, **widths)
        return AutoModelForCausalLM.from_config(config)

    return build


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-bf16": lambda: _llama().to(torch.bfloat16),
    "llama-biased": lambda: _llama(attention_bias=True),
    "llama-cls": _llama_classifier,
    "gpt2": _gpt2,
    "bert": _bert("BertModel"),
    "bert-cls": _bert("BertForSequenceClassification"),
    "bert-tokens": _bert("BertForTokenClassification"),
    "bert-qa": _bert("BertForQuestionAnswering", 2),
    "t5": _t5,
    "mixtral": _mixture("mixtral"),
    "qwen2-moe": _mixture("qwen2_moe"),
    "qwen3-moe": _mixture("qwen3_moe"),
}


@dataclass(frozen=True)
class Case:
    """A model and the arguments of its `LoraConfig`.

    Args:
        model: Key of `BASES`.
        options: Arguments of the first adapter's config.
        adapters: Names of the adapters.
        second: What further adapters have different.
        repeated: Keys under which upstream saves a tensor that it also saves under another.
    """

    model: str
    options: dict[str, Any]
    adapters: tuple[str, ...] = ("default",)
    second: dict[str, Any] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()

    def base(self) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The base model, the same one each time, and inputs for it."""
        torch.manual_seed(0)
        model = BASES[self.model]().eval()
        inputs = {"input_ids": _IDS}
        if self.model == "t5":
            inputs["decoder_input_ids"] = _IDS[:, :4]
        return model, inputs


def _causal(model: str = "llama", **options: Any) -> Case:
    return Case(model, {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, **options})


def _both(name: str, case: Case) -> dict[str, Case]:
    """The case, and the same with DoRA."""
    return {
        name: case,
        f"{name}-dora": Case(case.model, {**case.options, "use_dora": True}, case.adapters, case.second),
    }


_DOWN = {"target_modules": ["q_proj", "down_proj"]}
CASES: dict[str, Case] = {
    **_both("llama-defaults", _causal()),
    **_both("llama-all-linear", _causal(target_modules="all-linear")),
    "llama-regex": _causal(target_modules=r".*\.layers\.[02]\.(self_attn\.v|mlp\.up)_proj"),
    "llama-suffix": _causal(target_modules=["self_attn.k_proj", "1.mlp.gate_proj"]),
    "llama-exclude": _causal(target_modules="all-linear", exclude_modules=["k_proj", "gate_proj"]),
    "llama-exclude-regex": _causal(**_DOWN, exclude_modules=r".*\.1\..*"),
    "llama-one-layer": _causal(**_DOWN, layers_to_transform=1),
    "llama-layers": _causal(**_DOWN, layers_to_transform=[0, 2], layers_pattern="layers"),
    **_both("llama-patterns", _causal(**_DOWN, rank_pattern={"down_proj": 5}, alpha_pattern={r"layers\.1\..*": 9})),
    "llama-pattern-caret": _causal(**_DOWN, rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 4}),
    "llama-rslora": _causal(**_DOWN, use_rslora=True),
    "llama-gaussian": _causal(**_DOWN, init_lora_weights="gaussian"),
    "llama-random": _causal(**_DOWN, init_lora_weights=False),
    "llama-dora-random": _causal(**_DOWN, init_lora_weights=False, use_dora=True),
    "llama-bias-all": _causal("llama-biased", **_DOWN, bias="all"),
    "llama-bias-lora-only": _causal("llama-biased", **_DOWN, bias="lora_only"),
    "llama-dora-bias-lora-only": _causal("llama-biased", **_DOWN, bias="lora_only", use_dora=True),
    "llama-lora-bias": _causal("llama-biased", target_modules=["q_proj", "o_proj"], lora_bias=True),
    **_both("llama-save-head", _causal(**_DOWN, modules_to_save=["lm_head"])),
    "llama-save-embeddings": _causal(**_DOWN, modules_to_save=["embed_tokens", "lm_head"]),
    **_both("llama-embeddings", _causal(target_modules=["q_proj", "embed_tokens"])),
    **_both("llama-head", _causal(target_modules=["q_proj", "lm_head"])),
    "llama-save-norms": _causal(**_DOWN, modules_to_save=["norm", "m_tokens"]),  # input_layernorm and embed_tokens too
    "llama-tied": _causal("llama-tied", **_DOWN),
    "llama-tied-save-embeddings": _causal("llama-tied", **_DOWN, modules_to_save=["embed_tokens"]),
    "llama-tied-embeddings": _causal("llama-tied", target_modules=["q_proj", "embed_tokens"]),
    "llama-bf16": _causal("llama-bf16"),
    "llama-bf16-dora": _causal("llama-bf16", use_dora=True),
    **_both(
        "llama-two",
        Case(
            "llama",
            {"task_type": "CAUSAL_LM", "r": 3, **_DOWN},
            ("default", "other"),
            {"r": 4, "target_modules": ["down_proj", "v_proj"]},
        ),
    ),
    "llama-named": Case("llama", {"task_type": "CAUSAL_LM", "r": 3}, ("mine",)),
    **_both("llama-cls", Case("llama-cls", {"task_type": "SEQ_CLS", "r": 3})),
    **_both("gpt2", _causal("gpt2")),
    "gpt2-all": _causal("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    **_both("bert-cls", Case("bert-cls", {"task_type": "SEQ_CLS", "r": 3})),
    "bert-cls-bias-all": Case(
        "bert-cls",
        {"task_type": "SEQ_CLS", "r": 3, "bias": "all"},
        repeated=("base_model.model.classifier.modules_to_save.bias",),
    ),
    "bert-cls-lora-bias": Case("bert-cls", {"task_type": "SEQ_CLS", "r": 3, "lora_bias": True}),
    "bert-tokens": Case("bert-tokens", {"task_type": "TOKEN_CLS", "r": 3}),
    "bert-qa": Case("bert-qa", {"task_type": "QUESTION_ANS", "r": 3}),
    "bert-features": Case("bert", {"task_type": "FEATURE_EXTRACTION", "r": 3}),
    "bert-no-task": Case("bert", {"r": 3, "target_modules": ["query", "dense"]}),
    "bert-embeddings": Case("bert", {"r": 3, "target_modules": ["word_embeddings", "value"]}),
    # names of single experts' layers: in Mixtral and Qwen3-MoE the stacks, in Qwen2-MoE the shared expert alone
    "mixtral": _causal("mixtral", target_modules=["q_proj", "w1", "w2", "w3"]),
    "mixtral-attention": _causal("mixtral", target_modules=["q_proj"]),
    "mixtral-stacks": _causal("mixtral", target_parameters=["experts.gate_up_proj"]),
    "qwen3-moe": _causal("qwen3-moe", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "qwen2-moe": _causal("qwen2-moe", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "t5-layers": Case("t5", {"task_type": "SEQ_2_SEQ_LM", "r": 3, "layers_to_transform": 0}),  # block.0.layer.1 too
    **_both("t5", Case("t5", {"task_type": "SEQ_2_SEQ_LM", "r": 3})),
}
