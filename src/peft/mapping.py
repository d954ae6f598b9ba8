# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""From a `PeftType` to the classes of its method, and adapters in models without a `PeftModel` around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.config import PeftConfig
from peft.tuners._registry import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict describes.

    Args:
        config_dict: Fields of the config, and `peft_type`.

    Raises:
        ValueError: `peft_type` is missing or names no available method.

    Example:
        >>> from peft import get_peft_config
        >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    peft_type = config_dict.get("peft_type")
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        available = ", ".join(method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise ValueError(f"peft_type={peft_type!r} is not available; available: {available}.")
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**config_dict)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Create an adapter in the layers of a model without wrapping the model.

    The model is changed in place; its attribute `peft_config` is a dict of configs by adapter name.

    Args:
        peft_config: Config of the adapter.
        model: Any module.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create its parameters on the meta device, to be filled by loading.
        state_dict: A saved adapter; if given, the modules it has parameters for are adapted. Its values are not loaded,
            see `set_peft_model_state_dict`.

    Returns:
        The same model.

    Raises:
        ValueError: The method does not work on layers, or the config does not go with the model.
    """
    if peft_config.is_prompt_learning or peft_config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(f"peft_type={peft_config.peft_type!r} cannot be injected into the layers of a model.")
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
    return tuner_cls(
        model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    ).model


__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]
