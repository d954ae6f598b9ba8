# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Writing adapters to disk so that an interrupted save leaves what was there before."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file

from peft.config import PeftConfig
from peft.utils.atomic import StagedFiles
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import id_tensor_storage
from peft.utils.seams import public
from peft.weights import gathered, is_partitioned

if TYPE_CHECKING:
    from .base import PeftModel

FACADE = "peft.peft_model"


def save_adapters(
    model: PeftModel,
    directory: str | os.PathLike,
    *,
    safe_serialization: bool,
    selected_adapters: list[str] | None,
    save_embedding_layers: bool | Literal["auto"],
    is_main_process: bool,
    initial_adapter: str | None,
    kwargs: dict[str, Any],
) -> None:
    """`PeftModel.save_pretrained`."""
    if os.path.isfile(directory):
        raise ValueError(f"save_directory={os.fspath(directory)!r} is a file: give a folder.")
    if kwargs.get("push_to_hub"):
        raise ValueError("push_to_hub=True is not an argument of an adapter's save: call model.push_to_hub(repo_id).")
    names = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise ValueError(f"selected_adapters={unknown}: this model has {list(model.peft_config)}.")

    state_dict = kwargs.get("state_dict")
    if state_dict is None and is_partitioned(model):
        state_dict = model.state_dict(keep_vars=True)  # what ZeRO-3 says of a partition it says on the parameter
    folder = Path(directory)
    with StagedFiles() as files:
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            model.create_or_update_model_card(folder)
        for name in names:
            # every process takes part: a state dict may have to be gathered from all of them
            state = public(FACADE, "get_peft_model_state_dict")(
                model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
            )
            state = gathered(state)
            config = config_to_save(model, name)
            if initial_adapter is not None:
                state, config = as_plain_lora(model, name, config, state, initial_adapter)
            if is_main_process:
                target = folder if name == "default" else folder / name
                target.mkdir(parents=True, exist_ok=True)
                _stage_adapter(files, target, state, config, safe_serialization)


def _stage_adapter(
    files: StagedFiles, folder: Path, state: dict[str, torch.Tensor], config: PeftConfig, safe_serialization: bool
) -> None:
    """The weights and then the config of one adapter."""
    state = without_shared_storage(state)
    safe, other = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if safe_serialization:
        files.write(safe, lambda path: save_file(state, path, metadata={"format": "pt"}), obsolete=other)
    else:
        # a safetensors file that stayed would be loaded instead of this one
        files.write(other, lambda path: torch.save(state, path), obsolete=safe)
    files.write(folder / CONFIG_NAME, lambda path: path.write_bytes(_config_bytes(config)))


def _config_bytes(config: PeftConfig) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / CONFIG_NAME).read_bytes()


def without_shared_storage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each contiguous in memory of its own: safetensors refuses shared memory, and torch.save writes
    the whole memory behind a view."""
    seen: set[tuple] = set()
    separate = {}
    for key, tensor in state.items():
        tensor = tensor.detach().contiguous()
        storage = id_tensor_storage(tensor)
        if tensor.device.type != "meta" and (storage in seen or _is_view_of_more(tensor)):
            tensor = tensor.clone()
        seen.add(storage)
        separate[key] = tensor
    return separate


def _is_view_of_more(tensor: torch.Tensor) -> bool:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def config_to_save(model: PeftModel, adapter_name: str) -> PeftConfig:
    """A copy of an adapter's config as it goes to disk: for inference, with the base model named."""
    config = copy.copy(model.peft_config[adapter_name])
    base_model = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base_model, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {
            "base_model_class": type(base_model).__name__,
            "parent_library": type(base_model).__module__,
        }
    config.inference_mode = True
    return config


def as_plain_lora(
    model: PeftModel, adapter_name: str, config: PeftConfig, state: dict[str, torch.Tensor], initial_adapter: str
) -> tuple[dict[str, torch.Tensor], PeftConfig]:
    """An adapter whose initialisation changed the base weights, as one for the original base weights.

    With W the original weight and s·B₀A₀ what initialisation moved out of it, W − s·B₀A₀ + s·BA is W plus s times the
    product of [B, −B₀] and [A; A₀]: an ordinary adapter of twice the rank. Its scaling must stay s. DoRA's norm is that of
    the same sum, so that its magnitude stays as it is.

    Args:
        model: Model that holds the adapter.
        adapter_name: Name of the adapter.
        config: Its config as it is to be saved.
        state: Its tensors, by saved name.
        initial_adapter: Where it was saved before training.

    Raises:
        ValueError: The tuner cannot tell what its initialisation changed.
    """
    convert = getattr(model.base_model, "subtract_mutated_init", None)
    if convert is None:
        raise ValueError(
            f"path_initial_model_for_weight_conversion={initial_adapter!r}: {type(model.base_model).__name__} has no "
            f"subtract_mutated_init, so adapter {adapter_name!r} cannot be written for the original base model. Leave the "
            "argument out, and save the changed base model as well."
        )
    temporary = f"{adapter_name}__initial"
    training = model.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_adapter(initial_adapter, temporary, is_trainable=True)
    try:
        state = {**state, **convert(state, temporary)}
    finally:
        model.delete_adapter(temporary)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.train(training)
    growth = math.sqrt(2) if getattr(config, "use_rslora", False) else 2
    config.r *= 2
    config.lora_alpha *= growth
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return state, config
