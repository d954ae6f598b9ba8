# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Putting Arrow together (Ostapenko et al., arXiv 2405.11157): load the experts, check them, add a router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.utils.seams import public

from .config import ArrowConfig, LoraConfig
from .layer import LoraLayer
from .layer.linear import LoraLinearBase
from .variants.arrow import GKS_ADAPTER_PREFIX, ROUTER, TASK_ADAPTER_PREFIX, ArrowLoraLinearLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def create_arrow_model(
    base_model: PreTrainedModel,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> nn.Module:
    """A model whose tokens choose among LoRA experts.

    The experts are its adapters `task_0`, `task_1`, …, the active one is `arrow_router`. Experts that are loaded later
    join the others.

    Args:
        base_model: Base model, changed in place.
        task_specific_adapter_paths: Folders or repositories of the experts, LoRA on the same linear layers.
        arrow_config: Settings of the router.
        general_adapter_paths: Adapters `gks_0`, … whose mean is taken out of the experts where `use_gks` is set.
        **adapter_kwargs: Arguments of `PeftModel.from_pretrained`, the same for all adapters.

    Returns:
        The `PeftModel`, in evaluation mode.

    Raises:
        ValueError: No expert is given, `use_gks` is set without general adapters, or the adapters do not fit together.
        TypeError: An adapter is on a layer that is not linear.
    """
    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths is empty: give at least one expert.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True needs general_adapter_paths, the adapters whose mean is taken out.")
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    tasks = {f"{TASK_ADAPTER_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    gks = {f"{GKS_ADAPTER_PREFIX}{i}": path for i, path in enumerate(general)}
    (first, path), *others = (tasks | gks).items()
    model = public("peft.peft_model", "PeftModel").from_pretrained(
        base_model, path, adapter_name=first, **adapter_kwargs
    )
    for name, path in others:
        model.load_adapter(path, adapter_name=name, **adapter_kwargs)
    names = [first, *(name for name, _ in others)]
    ensure_adapters_target_linear_layers_only(model, names)
    check_loaded_lora_compatibility_arrow(model, names)
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(gks)
    config = model.peft_config[first]
    router = LoraConfig(
        arrow_config=arrow_config, r=config.r, target_modules=config.target_modules, task_type=config.task_type
    )
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model.eval()


def ensure_adapters_target_linear_layers_only(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise a TypeError where one of the adapters is on a layer that is not linear.

    Args:
        model: Model with the adapters.
        adapter_names: Their names.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, LoraLinearBase):
            present = [adapter for adapter in adapter_names if module.has_adapter(adapter)]
            if present:
                raise TypeError(
                    f"{', '.join(present)}: {name} is a {type(module).__name__}, and Arrow routes among linear layers "
                    "alone: train the experts with target_modules that are linear."
                )


def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise a ValueError where the adapters are not plain LoRA of one rank on the same layers.

    Args:
        model: Model with the adapters.
        adapter_names: Their names, the first one sets what the others must be.
    """
    first = adapter_names[0]
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in adapter_names:
            if module.has_adapter(adapter) != module.has_adapter(first):
                raise ValueError(f"{first} and {adapter} are not on the same layers: only one of them has {name}.")
            if module.has_adapter(adapter) and module.r[adapter] != module.r[first]:
                raise ValueError(
                    f"{adapter} has rank {module.r[adapter]} in {name}, and {first} has {module.r[first]}: experts must "
                    "have one rank."
                )
            if adapter in module.lora_variant or module.low_rank_bias(adapter) is not None:
                raise ValueError(f"{adapter} is not plain LoRA in {name}: Arrow routes among A and B alone.")


ArrowLoraLinearLayer.__module__ = __name__

__all__ = [
    "GKS_ADAPTER_PREFIX",
    "TASK_ADAPTER_PREFIX",
    "ArrowConfig",
    "ArrowLoraLinearLayer",
    "check_loaded_lora_compatibility_arrow",
    "create_arrow_model",
    "ensure_adapters_target_linear_layers_only",
]
