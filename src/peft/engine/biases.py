# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which of the base model's biases a config trains (`bias="all"`, `"lora_only"`), and what they are called in a file."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .layer import BaseTunerLayer


def trained_biases(model: nn.Module, names: Iterable[str], kind: str, adapter_name: str, prefix: str) -> list[str]:
    """The base biases that an adapter trains.

    Args:
        model: Model with the adapter.
        names: Names of the model's tensors, as they are in memory.
        kind: `"all"`; anything else than `"none"` for those of the layers that have the adapter.
        adapter_name: The adapter.
        prefix: What the names of its method's parameters start with.
    """
    if kind == "none":
        return []
    layers = adapted_layers(model)
    return [name for name in names if _is_trained(name, kind, layers, adapter_name, prefix)]


def _is_trained(name: str, kind: str, layers: dict[str, BaseTunerLayer], adapter_name: str, prefix: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    if "bias" not in leaf or f".{prefix}" in f".{name}" or ".modules_to_save." in name:
        return False
    layer = layers.get(owner.removesuffix(".base_layer"))
    if layer is not None and leaf in layer.frozen_biases:
        return False
    return kind == "all" or (layer is not None and leaf == "bias" and adapter_name in layer._get_available_adapters())


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def name_alone(key: str, layers: dict[str, BaseTunerLayer], adapter_name: str) -> str:
    """What a base tensor would be called in a model that carried this adapter alone: other wrappers left out."""
    parts = key.split(".")
    kept = []
    for i, part in enumerate(parts):
        layer = layers.get(".".join(parts[:i])) if part == "base_layer" else None
        if layer is None or adapter_name in layer._get_available_adapters():
            kept.append(part)
    return ".".join(kept)
