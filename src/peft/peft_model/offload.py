# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters beside base layers that accelerate moves between devices."""

from __future__ import annotations

from torch import nn

from peft.engine.devices import META, base_placement
from peft.engine.layer import BaseTunerLayer


def place_adapter(model: nn.Module, adapter_name: str) -> None:
    """Move one adapter's parameters to where its layers run; dtypes stay.

    The base weights of an offloaded model stay with accelerate, which brings them in and out layer by layer. An
    adapter is small, so it stays on the device that computes.

    Args:
        model: Model with adapted layers.
        adapter_name: Adapter to move.

    Raises:
        ValueError: A parameter has no values: it was to be computed from an offloaded weight, or was not loaded.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        device, _ = base_placement(layer)
        if device is None or device == META:
            continue
        for tensor in layer._slot_parameters(adapter_name):
            if tensor.device == META:
                raise ValueError(
                    f"A parameter of adapter {adapter_name!r} in {name!r} has no values: the saved adapter lacks it, or it "
                    "is computed from the base weight, which has no values here. Load the base model with its weights, and a "
                    "quantised one without offloading."
                )
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        layer._replan()
