# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Switching, freezing and deleting adapters across a whole model, with or without a `PeftModel` around it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.warning import PeftWarning

from .layer import BaseTunerLayer


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Make adapters the active ones in every layer of a model.

    Args:
        model: Model with adapted layers.
        adapter_name: One name or several.
        inference_mode: Leave the activated adapters frozen.
        layer_cls: Class of the layers to switch; others are left alone.
    """
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _set_wrapper(module, adapter_name, inference_mode)
        elif isinstance(module, layer_cls):
            if module.merged:
                warnings.warn(
                    "Adapters are merged; they are taken out of the base weights before others become active.",
                    PeftWarning,
                    stacklevel=2,
                )
                module.unmerge()
            module.set_adapter(adapter_name, inference_mode=inference_mode)


def _set_wrapper(module: AuxiliaryTrainingWrapper, adapter_name: str | list[str], inference_mode: bool) -> None:
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    known = [name for name in names if name in module._get_available_adapters()]
    module.set_adapter(known, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Freeze or thaw adapters in every layer of a model without changing which are active.

    Args:
        model: Model with adapted layers.
        adapter_names: One name or several.
        requires_grad: Whether they are to be trained.
    """
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter from every layer of a model.

    Args:
        model: Model with adapted layers.
        adapter_name: Adapter to remove.
        prefix: What the names of the method's parameters start with.
        layer_cls: Class of the layers to delete it from.

    Returns:
        The adapters that are active afterwards, None where no layer has any.

    Raises:
        ValueError: The adapter is merged; nothing was deleted.
    """
    layers = [module for module in model.modules() if isinstance(module, layer_cls)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the base weights: call unmerge_adapter() before deleting it."
        )
    active: list[str] | None = None
    for layer in layers:
        layer.delete_adapter(adapter_name)
        if active is None and layer._get_available_adapters():
            active = list(layer.active_adapters)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, new_active_adapters=active)
    return active
