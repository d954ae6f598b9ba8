# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters beside base layers that accelerate moves between devices."""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from peft.engine.devices import META, base_placement
from peft.engine.layer import BaseTunerLayer


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module it offloads, None if it does not."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    for candidate in hooks:
        if isinstance(candidate, AlignDevicesHook) and candidate.execution_device is not None:
            return torch.device(candidate.execution_device)
    return None


def adapter_device(layer: BaseTunerLayer) -> torch.device | None:
    """Where an adapter of this layer has to be: beside the base weight, or where an offloaded layer is run.

    The base weights stay with accelerate, which brings them in and out layer by layer. An adapter is small, so it
    stays on the device that computes.
    """
    device, _ = base_placement(layer)
    return _execution_device(layer.get_base_layer()) if device is None or device == META else device


def place_adapter(model: nn.Module, adapter_name: str) -> None:
    """Move one adapter's parameters to where its layers run; dtypes stay.

    Args:
        model: Model with adapted layers.
        adapter_name: Adapter to move.

    Raises:
        ValueError: A parameter has no values: it was to be computed from an offloaded weight, or was not loaded.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        device = adapter_device(layer)
        if device is None or device == META:
            continue
        for tensor in layer._slot_parameters(adapter_name):
            if tensor.device == META:
                raise ValueError(
                    f"A parameter of adapter {adapter_name!r} in {name!r} has no values: the saved adapter lacks it, or it "
                    "is computed from the base weight, which is offloaded. Load the base model without offloading."
                )
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        layer._replan()
