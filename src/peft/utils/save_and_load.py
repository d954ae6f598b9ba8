# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters between models and files, under the names and at the path where other packages look for it."""

from __future__ import annotations

import os
import re
import warnings
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peft.engine import state_dict as _engine
from peft.engine.targets import is_transformers_model
from peft.weights import filling

from .constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .other import infer_device
from .warning import PeftWarning

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")


def _tuner_of(config: Any) -> type:
    from peft.tuners._registry import PEFT_TYPE_TO_TUNER_MAPPING

    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(
            f"peft_type={config.peft_type!r} is not a method of this version; it has "
            f"{', '.join(sorted(PEFT_TYPE_TO_TUNER_MAPPING))}."
        )
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise KeyError(
            f"There is no adapter {adapter_name!r}; the model has {', '.join(map(repr, configs)) or 'none'}."
        )
    return configs[adapter_name]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter under the names that its file has.

    Args:
        model: A `PeftModel`, or any model with a `peft_config` that adapters were injected into.
        state_dict: The model's state, for example gathered from its shards; None for `model.state_dict()`.
        adapter_name: Which adapter.
        unwrap_compiled: Look inside `torch.compile`'s wrapper.
        save_embedding_layers: Save base embeddings too: True, False, or "auto" for where they are adapted or resized.

    Raises:
        KeyError: The model has no such adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = _config_of(model, adapter_name)
    state = model.state_dict() if state_dict is None else state_dict
    tensors = _engine.adapter_state_dict(model, _tuner_of(config), config, adapter_name, state, save_embedding_layers)
    flat = [key for key, tensor in tensors.items() if _FACTOR.search(key) and (tensor.dim() < 2 or not tensor.numel())]
    if flat:
        warnings.warn(
            f"Adapter {adapter_name!r}: {', '.join(flat)} are no matrices, but of shape {list(tensors[flat[0]].shape)}, as in "
            "a model whose parameters are on other ranks: pass a state_dict that was gathered, such as accelerator."
            "get_state_dict(model).",
            PeftWarning,
            stacklevel=2,
        )
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _engine.IncompatibleKeys:
    """Put saved tensors into an adapter of a model.

    Args:
        model: A `PeftModel`, or any model with a `peft_config` that adapters were injected into.
        peft_model_state_dict: Tensors under the names that a file has.
        adapter_name: Which adapter.
        ignore_mismatched_sizes: Leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: Put the tensors themselves into the model, whose own are on the meta device.

    Returns:
        `missing_keys` of this adapter and `unexpected_keys` of the file.

    Raises:
        KeyError: The model has no such adapter.
        TypeError: A value is no tensor.
        RuntimeError: A tensor has another shape or kind of dtype; nothing was changed.
    """
    config = _config_of(model, adapter_name)
    saved = _for_installed_transformers(model, config, peft_model_state_dict)
    return _engine.load_adapter_state_dict(
        model,
        _tuner_of(config),
        config,
        adapter_name,
        _maybe_shard_state_dict_for_tp(model, saved, adapter_name),
        ignore_mismatched_sizes,
        low_cpu_mem_usage,
    )


def _for_installed_transformers(
    model: nn.Module, config: Any, saved: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A saved adapter with the names that the installed transformers gives the modules of its models."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not is_transformers_model(base) or find_spec("transformers.core_model_loading") is None:
        return saved
    from .transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    return convert_peft_adapter_state_dict_for_transformers(model, config, saved)


def _maybe_shard_state_dict_for_tp(
    model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    """Whole tensors of a file, split over devices as the model's own are; other packages replace this function.

    Args:
        model: Model with the adapter.
        state_dict: Tensors by saved name.
        adapter_name: Its name in the model.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return state_dict
    from torch.distributed.tensor import DTensor, distribute_tensor

    config = model.peft_config[adapter_name]
    tuner = _tuner_of(config)
    sharded = {
        tuner._remove_adapter_name_from_key(key, adapter_name): tensor
        for key, tensor in model.state_dict().items()
        if isinstance(tensor, DTensor)
    }
    split = dict(state_dict)
    for key, value in state_dict.items():
        like = sharded.get(key)
        if like is not None and not isinstance(value, DTensor) and value.shape == like.shape:
            split[key] = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return split


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` that by default unpickles tensors and nothing else."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **hf_hub_download_kwargs: Any
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors from a folder or from the hub, safetensors before `.bin`.

    Args:
        model_id: Folder or repository.
        device: Where to put them; None for the accelerator, if there is one.
        key_mapping: Regular expressions and what to replace their matches by in the tensors' names.
        hf_hub_download_kwargs: Arguments of `huggingface_hub.hf_hub_download`, `subfolder` among them.

    Raises:
        ValueError: There is no such file, or it is broken, and the message names it; or there is no such device.
    """
    path = _find_weights(os.fspath(model_id), hf_hub_download_kwargs)
    device = _usable_device(infer_device() if device is None else device)
    try:
        if path.endswith(".safetensors"):
            tensors = load_file(path, device=str(device))
        else:
            tensors = torch_load(path, map_location=device)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is truncated, or no file of tensors. Save or "
            "download the adapter again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds something other than named tensors: it is no adapter's file.")
    if not key_mapping:
        return tensors
    return {_mapped(key, key_mapping): value for key, value in tensors.items()}


def _usable_device(device: Any) -> torch.device:
    """A device that tensors can be read to, found out before a file is opened."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device={device!r} cannot be used here ({error}): name another, such as 'cpu'.") from error
    if found.type == "meta":
        raise ValueError("device='meta' holds no values, so nothing can be read to it: name another, such as 'cpu'.")
    return found


def _find_weights(model_id: str, hub_kwargs: dict[str, Any]) -> str:
    subfolder = hub_kwargs.get("subfolder")
    folder = os.path.join(model_id, subfolder) if subfolder else model_id
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    missing = (
        f"Found neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} in {folder!r}: give the folder that the adapter "
        "was saved to (adapters not called 'default' are in a subfolder of their name), or a repository's id."
    )
    if os.path.isdir(folder):
        raise ValueError(missing)
    arguments = {key: value for key, value in hub_kwargs.items() if key != "use_auth_token"}
    if "use_auth_token" in hub_kwargs:  # what the token was called once
        arguments.setdefault("token", hub_kwargs["use_auth_token"])
    try:
        try:
            return hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, **arguments)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return hf_hub_download(model_id, WEIGHTS_NAME, **arguments)
    except Exception as error:
        raise ValueError(f"{missing} The hub gave none ({type(error).__name__}: {error}).") from error


def _mapped(key: str, key_mapping: dict[str, str]) -> str:
    """A key after the first pattern that matches it; patterns speak of names in the base model."""
    prefix = _PREFIX if key.startswith(_PREFIX) else ""
    name = key[len(prefix) :]
    for pattern, replacement in key_mapping.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return prefix + name


# ---- embeddings ----------------------------------------------------------------------------------------------------
def has_valid_embedding_base_layer(layer: nn.Module) -> bool:
    """Whether an adapter sits on this embedding or output layer."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """The name of an embedding in a model, None where it is not part of it.

    Args:
        model: Model to search.
        layer: The embedding, or the adapted layer around it.
        is_embedding_in_target_modules: Whether to look for adapted layers only.
    """
    return _engine.embedding_layer_name(model, layer, is_embedding_in_target_modules)


# ---- the base model alone ------------------------------------------------------------------------------------------
def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's tensors under the names that they have without adapters."""
    state = model.state_dict()
    return {plain: state[key] for key, plain in _engine.base_names(model).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True) -> Any:
    """Load a plain base model's tensors into the base model inside a model with adapters.

    Args:
        model: Model with adapters.
        state_dict: Tensors under the base model's own names.
        strict: Refuse missing and unknown names.

    Returns:
        The names that `state_dict` lacks and those that the base model does not have.

    Raises:
        RuntimeError: `strict` and the names do not agree, or a tensor has another shape or kind of dtype; nothing was
            changed.
    """
    live = {plain: key for key, plain in _engine.base_names(model).items()}
    missing = [name for name in live if name not in state_dict]
    unexpected = [name for name in state_dict if name not in live]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"The state dict is not this base model's. Missing: {missing or 'none'}. Unknown: {unexpected or 'none'}."
        )
    current = model.state_dict(keep_vars=True)
    placed = {live[name]: value for name, value in state_dict.items() if name in live}
    mismatched = _engine.mismatched_shapes(placed, current)
    if mismatched:
        raise RuntimeError(
            f"Shapes differ from the base model's:\n{_engine.compared_shapes(mismatched, placed, current)}\n"
            "Load the state dict into the model that it was taken from."
        )
    _engine.check_dtypes(placed, current)
    with filling(current[key] for key in placed):
        model.load_state_dict(placed, strict=False)
    return _engine.IncompatibleKeys(missing, unexpected)


__all__ = [
    "get_base_model_state_dict",
    "get_embedding_layer_name",
    "get_peft_model_state_dict",
    "has_valid_embedding_base_layer",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "torch_load",
]
