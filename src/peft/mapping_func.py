# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`get_peft_model`: the class for a task, around a model."""

from __future__ import annotations

import warnings

from torch import nn

from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.config import PeftConfig
from peft.engine.layer import BaseTunerLayer
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel
from peft.utils.warning import PeftWarning


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", mixed: bool = False,
    autocast_adapter_dtype: bool = True, revision: str | None = None, low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:  # fmt: skip
    """Put a new adapter on a model.

    Args:
        model: Base model; its layers are wrapped in place.
        peft_config: Config of the adapter.
        adapter_name: Name of the adapter.
        mixed: Allow adapters of several methods in one model.
        autocast_adapter_dtype: Keep adapters in float32 where the base model is in float16 or bfloat16.
        revision: Revision of the base model, written into the config.
        low_cpu_mem_usage: Create the adapter's parameters on the meta device, to be filled by loading.

    Returns:
        The model in the class for `peft_config.task_type`, or a `PeftMixedModel`.

    Raises:
        TypeError: `model` or `peft_config` is of another type.
        ValueError: The method is not available, or the config does not go with the model.

    Example:
        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.get_nb_trainable_parameters()
        (32, 104)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: load the base model first.")
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a PeftConfig, got {type(peft_config).__name__}: get_peft_config makes one of a dict."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        warnings.warn(
            "This model has adapters already, and gets another around or beside them. If they were to be replaced, "
            "call unload() first.",
            PeftWarning,
            stacklevel=2,
        )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type)
    if prefix and prefix in adapter_name:
        warnings.warn(
            f"adapter_name={adapter_name!r} holds {prefix!r}, which other programs take for the start of a parameter's "
            "name: use another name.",
            PeftWarning,
            stacklevel=2,
        )
    if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
        warnings.warn(
            "init_lora_weights='eva' fills A later: with low_cpu_mem_usage=True no memory is taken for it until then.",
            PeftWarning,
            stacklevel=2,
        )
    _name_base_model(model, peft_config, revision)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return cls(
        model, peft_config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )  # fmt: skip


def _name_base_model(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Write into a config which model it is for, where the model says."""
    name = getattr(model, "name_or_path", None)
    if isinstance(name, str) and name:
        if config.base_model_name_or_path not in (None, name):
            warnings.warn(
                f"base_model_name_or_path={config.base_model_name_or_path!r} in the config becomes {name!r}, which is "
                "what the model was loaded from.",
                PeftWarning,
                stacklevel=3,
            )
        config.base_model_name_or_path = name
    if revision is not None:
        if config.revision not in (None, revision):
            warnings.warn(
                f"revision={config.revision!r} in the config becomes {revision!r}, which was asked for.",
                PeftWarning,
                stacklevel=3,
            )
        config.revision = revision


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "get_peft_model",
]
