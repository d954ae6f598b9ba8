# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What starts that look at data share: which modules an adapter will go into, before it exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.engine.targets import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key

if TYPE_CHECKING:
    from ..config import LoraConfig


def linear_targets(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the linear layers that a config targets, in the order of the model.

    Raises:
        ValueError: `target_modules` is not set and there is no default for the model's type.
    """
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if default is None:
            raise ValueError(
                f"target_modules is not set and there is no default for the model type {model_type!r}: set it."
            )
        config.target_modules = default if isinstance(default, str) else set(default)
    config = _maybe_include_all_linear_layers(config, model)
    for name, module in model.named_modules():
        found = check_target_module_exists(config, name)
        if found and not isinstance(found, _ExcludedModule) and isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def rank_of(name: str, config: LoraConfig) -> int:
    """The rank that the adapter will have in a module."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)


def model_device(model: nn.Module) -> str:
    """Type of the device of a model's first parameter; the innermost model's where it is wrapped."""
    while not any(True for _ in model.parameters()) and hasattr(model, "module"):
        model = model.module
    return next(model.parameters()).device.type
