# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""File names, shorthands and the modules that each method adapts by default, by the base model's `model_type`."""

from __future__ import annotations

from copy import deepcopy

import torch

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
# Lists of target modules at least this long are shortened to suffixes.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Dtypes too small to train in, by name, since not every torch release has all of them.
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def bloom_model_postprocess_past_key_value(
    past_key_values: tuple[torch.Tensor, ...],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Bring the learnt prefix of prefix tuning into the layout of Bloom's cache.

    Args:
        past_key_values: One tensor `[2, batch, heads, tokens, head_dim]` a layer. Joined, the first half of the slices
            holds the keys of all layers and the second half their values.

    Returns:
        For each layer the keys `[batch * heads, head_dim, tokens]` and the values `[batch * heads, tokens, head_dim]`.
        The order of the keys' elements is part of the checkpoint format.
    """
    slices = torch.cat(past_key_values)  # [2 * layers, batch, heads, tokens, head_dim]
    layers, batch, heads, tokens, head_dim = slices.shape
    keys, values = slices.split(layers // 2)
    keys = keys.transpose(2, 3).reshape(-1, batch * heads, head_dim, tokens)
    values = values.reshape(-1, batch * heads, tokens, head_dim)
    return tuple(zip(keys, values, strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Bring the learnt prefix of prefix tuning into the layout of a multi-query cache (GPTBigCode).

    Args:
        past_key_values: One tensor `[2, batch, heads, tokens, head_dim]` a layer; all heads but the first are unused.

    Returns:
        One tensor `[batch, tokens, 2 * head_dim]` a layer, keys and values side by side.
    """
    return tuple(torch.cat([keys[:, 0], values[:, 0]], dim=-1) for keys, values in past_key_values)


# ---- default targets -----------------------------------------------------------------------------------------------
def _table(rows: dict[str, str]) -> dict[str, list[str]]:
    """Build a table from `{"module names": "model types that use them"}`, both separated by blanks."""
    return {model: modules.split() for modules, models in rows.items() for model in models.split()}


def _variant(table: dict, without: str = "", **changes: str) -> dict:
    """A copy of a table that shares no list with it, without some model types and with others set or replaced."""
    kept = {model: deepcopy(modules) for model, modules in table.items() if model not in without.split()}
    return {**kept, **{model: modules.split() for model, modules in changes.items()}}


_GEMMA4_ATTENTION = r".*language_model\..*\.(q_proj|v_proj)"  # leaves the vision and audio towers alone

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = _table(
    {
        "q v": "t5 mt5",
        "q v q_proj v_proj": "blip-2",
        "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
        "qwen2 qwen3",
        "q_proj v_proj fc1 fc2": "phi",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "query value": "bert roberta xlm-roberta electra layoutlm",
        "query_proj value_proj": "deberta-v2",
        "in_proj": "deberta",
        "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        "c_attn": "gpt2 gpt_bigcode",
        "c_proj c_attn": "btlm",
        "qkv_proj": "codegen",
        "Wqkv": "mpt",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
    }
)
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gemma4"] = _GEMMA4_ATTENTION

_LORA = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING = _variant(_LORA)
TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING = _variant(_LORA)

# Without Phi's feed-forward layers, so that all targets have one shape.
_SQUARE = _variant(_LORA, phi="q_proj v_proj")
TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING = _variant(_SQUARE)
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = _variant(_SQUARE)
TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING = _variant(_SQUARE, dinov2="query value")
TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING = _variant(_SQUARE, vit="query value")
TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING = _variant(_LORA, vit="query value")

TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING = _variant(_LORA, gpt2="mlp.c_proj", gpt_bigcode="mlp.c_proj")
TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING = _variant(TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING)
TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING = _variant(
    TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING, without="btlm rwkv rwkv7"
)

TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = _table(
    {
        "q k v o wi wo": "t5",
        "q k v o wi_0 wi_1 wo": "mt5",
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
        "q_proj v_proj": "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "query value": "bert",
        "query key value dense": "roberta",
        "query_proj key_proj value_proj dense": "deberta-v2",
        "in_proj": "deberta",
        "query_key_value": "bloom gpt_neox",
        "c_attn": "gpt2 gpt_bigcode",
    }
)
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING["gemma4"] = _GEMMA4_ATTENTION
TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING = _variant(
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING, roberta="query value"
)

TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING = _table(
    {
        "v": "t5 mt5",
        "v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
        "value": "bert roberta",
        "value_proj": "deberta-v2",
    }
)

TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = _table(
    {
        "k v wo": "t5",
        "k v wi_1": "mt5",
        "q_proj v_proj fc2": "bart phi",
        "q_proj k_proj fc2": "opt",
        "q_proj v_proj fc_out": "gptj",
        "q_proj v_proj c_proj": "gpt_neo",
        "k_proj v_proj down_proj": "llama mistral",
        "k_proj v_proj w2": "mixtral",
        "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        "key value output.dense": "bert roberta",
        "key_proj value_proj output.dense": "deberta-v2",
        "in_proj output.dense": "deberta",
        "query_key_value mlp.dense_4h_to_h": "bloom",
        "query_key_value dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
        "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    }
)
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = _table(
    {
        "wo": "t5",
        "": "mt5",
        "fc2": "bart opt phi",
        "fc_out": "gptj",
        "c_proj": "gpt_neo",
        "down_proj": "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
        "w2": "mixtral",
        "output.dense": "bert roberta deberta-v2 deberta",
        "mlp.dense_4h_to_h": "bloom",
        "dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
        "mlp.c_proj": "gpt2 gpt_bigcode",
    }
)

TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = _table(
    {
        "layer_norm final_layer_norm": "t5 mt5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": "gemma2 "
        "gemma3_text",
        "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        "input_layernorm final_layernorm": "phi",
        "post_attention_layernorm": "qwen2 qwen3",
        "ln_1 ln_2 ln_f": "gpt2",
        "ln_1 ln_f": "gptj",
    }
)

TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING = _table(
    {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": "llama llama4 mistral mixtral gemma gemma2 "
        "gemma3_text qwen2 qwen3 phi",
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
        "c_attn c_proj": "gpt2 gpt_bigcode",
    }
)

# How each model type wants a learnt prefix laid out, beyond what transformers' caches do themselves: none, today.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict = {}

__all__ = [name for name in globals() if (name.isupper() and name[0] != "_") or name.endswith("_past_key_value")]
