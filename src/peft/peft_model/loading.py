# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Reading adapters from disk or from the Hub; a load that fails leaves the model as it was."""

from __future__ import annotations

import inspect
import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from peft.config import PeftConfig
from peft.engine.targets import is_transformers_model
from peft.utils.seams import public
from peft.utils.warning import PeftWarning

from .offload import place_adapter

if TYPE_CHECKING:
    from .base import PeftModel

FACADE = "peft.peft_model"
# What is passed on to huggingface_hub; other keyword arguments are for loading base models.
HUB_ARGUMENTS = {*inspect.signature(hf_hub_download).parameters, "use_auth_token"} - {
    "repo_id",
    "filename",
    "local_dir",
}


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that say where and how to fetch a file."""
    chosen = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    legacy_token = chosen.pop("use_auth_token", None)
    if legacy_token is not None:
        chosen.setdefault("token", legacy_token)
    return chosen


def load_config(
    model_id: str | os.PathLike, is_trainable: bool, ephemeral_gpu_offload: bool, kwargs: dict[str, Any]
) -> PeftConfig:
    """The saved config, set up for inference or for training."""
    config = PeftConfig.from_pretrained(os.fspath(model_id), **hub_arguments(kwargs))
    if hasattr(config, "found_in"):
        config.found_in(os.path.join(model_id, kwargs.get("subfolder") or ""))
    return prepare_config(config, is_trainable, ephemeral_gpu_offload)


def prepare_config(config: PeftConfig, is_trainable: bool, ephemeral_gpu_offload: bool) -> PeftConfig:
    """Write into a config what it is loaded for."""
    config.inference_mode = not is_trainable
    if ephemeral_gpu_offload:
        if not hasattr(config, "runtime_config"):
            raise ValueError(
                f"ephemeral_gpu_offload=True: {type(config).__name__} has no such option, leave the argument out."
            )
        config.runtime_config.ephemeral_gpu_offload = True
    return config


def read_weights(
    model: nn.Module,
    model_id: str | os.PathLike,
    torch_device: str | None,
    key_mapping: dict[str, str] | None,
    kwargs: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """The saved tensors. They are read before the model is touched, so that a broken file changes nothing."""
    if key_mapping is None:
        key_mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
    load = public(FACADE, "load_peft_weights")
    # copying into place moves the tensors anyway, so nothing is gained by reading them to an accelerator
    return load(os.fspath(model_id), device=torch_device or "cpu", key_mapping=key_mapping, **hub_arguments(kwargs))


def fit_config(config: PeftConfig, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Let the config of an adapter of single experts name the stacks that transformers makes of them since version 5."""
    if is_transformers_model(model) and find_spec("transformers.core_model_loading") is not None:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_saved_experts

        convert_peft_config_for_saved_experts(config, model, weights)


def from_pretrained(
    cls: type[PeftModel],
    model: nn.Module,
    model_id: str | os.PathLike,
    *,
    adapter_name: str,
    is_trainable: bool,
    config: PeftConfig | None,
    autocast_adapter_dtype: bool,
    ephemeral_gpu_offload: bool,
    low_cpu_mem_usage: bool,
    key_mapping: dict[str, str] | None,
    kwargs: dict[str, Any],
) -> PeftModel:
    """`PeftModel.from_pretrained`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: load the base model first.")
    if config is None:
        config = load_config(model_id, is_trainable, ephemeral_gpu_offload, kwargs)
    elif isinstance(config, PeftConfig):
        config = prepare_config(config, is_trainable, ephemeral_gpu_offload)
    else:
        raise ValueError(f"config must be a PeftConfig, got {type(config).__name__}.")
    weights = read_weights(model, model_id, kwargs.get("torch_device"), key_mapping, kwargs)
    fit_config(config, model, weights)
    peft_model = class_for(cls, config)(
        model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )  # fmt: skip
    try:
        fill(peft_model, adapter_name, weights, model_id, autocast_adapter_dtype, low_cpu_mem_usage, kwargs)
    except Exception:
        peft_model.base_model.unload()
        raise
    if not is_trainable:
        peft_model.eval()
    return peft_model


def class_for(cls: type[PeftModel], config: PeftConfig) -> type[PeftModel]:
    """The class of a config's task, unless `cls` is a subclass of that class."""
    by_task = public("peft.mapping_func", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING").get(config.task_type, cls)
    return cls if issubclass(cls, by_task) else by_task


def load_adapter(
    model: PeftModel,
    model_id: str | os.PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    torch_device: str | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """`PeftModel.load_adapter`."""
    is_new = adapter_name not in model.peft_config
    config = load_config(model_id, is_trainable, ephemeral_gpu_offload, kwargs) if is_new else None
    weights = read_weights(model.get_base_model(), model_id, torch_device, key_mapping, kwargs)
    if config is not None:
        fit_config(config, model.get_base_model(), weights)
        model.add_adapter(
            adapter_name,
            config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    try:
        result = fill(model, adapter_name, weights, model_id, autocast_adapter_dtype, low_cpu_mem_usage, kwargs)
    except Exception:
        if is_new:
            model.delete_adapter(adapter_name)
        raise
    if not is_trainable:
        model.eval()
    elif is_new:
        model.set_requires_grad(adapter_name)
    return result


def fill(
    model: PeftModel,
    adapter_name: str,
    weights: dict[str, torch.Tensor],
    model_id: str | os.PathLike,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Put loaded tensors into an adapter that is there."""
    where = f"the adapter saved at {os.fspath(model_id)!r}"
    try:
        result = public(FACADE, "set_peft_model_state_dict")(
            model,
            weights,
            adapter_name=adapter_name,
            ignore_mismatched_sizes=(kwargs or {}).get("ignore_mismatched_sizes", False),
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    except RuntimeError as error:
        raise RuntimeError(f"Cannot load {where}. {error}") from error
    if result.missing_keys:
        warnings.warn(
            f"{where} lacks {len(result.missing_keys)} parameters of adapter {adapter_name!r}, which keep their initial "
            f"values: {', '.join(result.missing_keys)}.",
            PeftWarning,
            stacklevel=5,
        )
    if result.unexpected_keys:
        warnings.warn(
            f"{where} holds {len(result.unexpected_keys)} tensors that this model has no place for, and that are not "
            f"used: {', '.join(result.unexpected_keys)}.",
            PeftWarning,
            stacklevel=5,
        )
    if low_cpu_mem_usage:
        place_adapter(model.base_model, adapter_name)
        model.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    return result
