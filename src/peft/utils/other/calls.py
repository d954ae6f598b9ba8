# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Small things around a model's call: masks, shifted labels, prompt dimensions, sharding policy, devices, the hub."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from accelerate.utils import is_mlu_available
from huggingface_hub import constants as hub_constants
from huggingface_hub import file_exists
from torch import nn

from peft.utils.warning import PeftWarning

mlu_available = is_mlu_available()

_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


def str_to_bool(value: str) -> int:
    """1 or 0 for the usual spellings of true and false, in any case.

    Raises:
        ValueError: The text is neither.
    """
    lowered = value.lower()
    if lowered in _TRUE:
        return 1
    if lowered in _FALSE:
        return 0
    raise ValueError(f"value={value!r} is neither true ({', '.join(_TRUE)}) nor false ({', '.join(_FALSE)}).")


def infer_device() -> str:
    """The type of the accelerator that this process can use, "cpu" if there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """A weight `[out, in]` for one that may be stored `[in, out]`, as a view.

    Args:
        weight: Tensor of two dimensions. A parameter stays a parameter that shares its memory.
        fan_in_fan_out: Whether to transpose; if not, the weight itself is returned.
    """
    if not fan_in_fan_out:
        return weight
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(weight.T, requires_grad=weight.requires_grad)
    return weight.T


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> torch.Tensor:
    """The decoder's input for labels: one place to the right, the start token in front, -100 replaced by padding.

    Args:
        input_ids: Labels `[batch, tokens]`, integers.
        pad_token_id: What replaces ignored labels (-100).
        decoder_start_token_id: First token of every row.

    Raises:
        ValueError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id is None: set model.config.pad_token_id, it replaces ignored labels.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill_(shifted == -100, pad_token_id)


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """The number of rows of a call.

    Raises:
        ValueError: Both arguments are None.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError("Neither input_ids nor inputs_embeds is given: pass one of them.")
    return given.shape[0]


def create_attention_mask(
    model: nn.Module,
    *,
    model_input: dict[str, Any],
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cache_position: torch.Tensor | None,
    batch_size: int,
    sequence_length: int,
    position_ids: torch.Tensor | None,
) -> Any:
    """The mask that a generation step of a transformers model gets, in the layout of its attention implementation.

    Args:
        model: Base model.
        model_input: Inputs of the step; `inputs_embeds` is used if it is there.
        attention_mask: Padding mask `[batch, seen + new tokens]`, or None.
        past_key_values: Cache, or None.
        cache_position: Positions of the new tokens in the cache; read off the cache by recent transformers.
        batch_size: Rows of the batch.
        sequence_length: New tokens of a row.
        position_ids: Positions `[batch, tokens]`, or None.

    Returns:
        What `create_masks_for_generate` of the model, or else of transformers, makes of it.
    """
    from transformers.masking_utils import create_masks_for_generate

    embeds = model_input.get("inputs_embeds")
    if embeds is None:
        # only shape, dtype and device are read from it
        embeds = torch.empty((batch_size, sequence_length, 0), dtype=model.dtype, device=model.device)
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return create(
        config=model.config,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        cache_position=cache_position,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def _prepare_prompt_learning_config(peft_config: Any, model_config: dict) -> Any:
    """Fill in the dimensions that a learnt prompt takes from the base model, where the config leaves them open.

    Args:
        peft_config: Config with `num_layers`, `token_dim`, `num_attention_heads` and, for some methods,
            `encoder_hidden_size`; it is changed in place and returned.
        model_config: Config of the base model as a dict.

    Raises:
        ValueError: The base model's config does not tell one of them.
    """
    config = model_config.get("text_config") or model_config
    sources = {
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
        "token_dim": ("hidden_size", "n_embd", "d_model"),
        "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    }
    for attribute, names in sources.items():
        if getattr(peft_config, attribute) is None:
            value = next((config[name] for name in names if config.get(name) is not None), None)
            if value is None:
                raise ValueError(
                    f"{attribute} is not set and the base model's config has none of {', '.join(names)}: set "
                    f"{attribute} in the {type(peft_config).__name__}."
                )
            setattr(peft_config, attribute, value)
    key_value_heads = config.get("num_key_value_heads")
    if getattr(peft_config.peft_type, "value", None) == "PREFIX_TUNING" and key_value_heads is not None:
        # a prefix stands in the cache, which holds one key and one value for a whole group of query heads
        peft_config.token_dim = peft_config.token_dim // peft_config.num_attention_heads * key_value_heads
        peft_config.num_attention_heads = key_value_heads
    if getattr(peft_config, "encoder_hidden_size", 0) is None:
        peft_config.encoder_hidden_size = peft_config.token_dim
    return peft_config


def fsdp_auto_wrap_policy(model: nn.Module) -> functools.partial:
    """Which modules FSDP shards one by one: trainable leaves, learnt prompts and the model's transformer blocks.

    The blocks are the classes that FSDP_TRANSFORMER_CLS_TO_WRAP names, or those the model itself does not split.

    Args:
        model: Model with adapters.

    Raises:
        ValueError: The environment names a class that the model does not contain.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    split = ",".join(getattr(model, "_no_split_modules", None) or [])
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", split)
    blocks = {type(encoder) for encoder in getattr(model, "prompt_encoder", {}).values()}
    classes = {type(module).__name__: type(module) for module in model.modules()}
    for name in filter(None, named.split(",")):
        block = classes.get(name)
        if block is not None:
            blocks.add(block)
        elif "FSDP_TRANSFORMER_CLS_TO_WRAP" in os.environ:
            raise ValueError(
                f"FSDP_TRANSFORMER_CLS_TO_WRAP names {name!r}, but the model has no module of that class."
            )
    policies = [functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf)]
    policies.append(functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks))
    return functools.partial(_or_policy, policies=policies)


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return next(module.children(), None) is None and weight is not None and weight.requires_grad


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository on the hub, or a local folder, has a file; None where that cannot be found out.

    Args:
        repo_id: Repository, or path of a folder.
        filename: Path of the file inside it.
        **kwargs: Handed to `huggingface_hub.file_exists`, such as `revision` and `token`.
    """
    if os.path.isdir(repo_id):
        return os.path.isfile(os.path.join(repo_id, filename))
    if hub_constants.HF_HUB_OFFLINE or str_to_bool(os.environ.get("HF_HUB_OFFLINE") or "0"):
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except Exception as error:  # the network has many ways to fail, and the answer is optional
        warnings.warn(
            f"Could not find out whether {repo_id} has a file {filename}: {error}", PeftWarning, stacklevel=2
        )
        return None
