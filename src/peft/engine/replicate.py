# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Deeper models from the same weights: layers repeated by reference, so that only their adapters differ."""

from __future__ import annotations

import copy

from torch import nn


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A deep copy of a module, with its own modules but, if asked for, the original's parameters and buffers.

    Args:
        module: Module to copy.
        share_weights: Keep the original tensors instead of copies.
    """
    if not share_weights:
        return copy.deepcopy(module)
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Rebuild a decoder's or encoder's list of layers from ranges of the old one; repeated layers share weights.

    Args:
        model: A transformers model whose layers are a module list named `layers`, `h` or `layer`.
        layer_map: Half-open ranges `(start, end)` of old layer numbers, in the new order, such as
            `[(0, 4), (2, 5)]` for seven layers out of five.

    Raises:
        ValueError: The model has no such list of layers, or a range leaves it.
    """
    owner, attribute = _find_layers(model)
    old: nn.ModuleList = getattr(owner, attribute)
    numbers = [number for start, end in layer_map for number in range(start, end)]
    if not numbers or min(numbers) < 0 or max(numbers) >= len(old):
        raise ValueError(f"layer_replication={layer_map!r} must give ranges within the model's {len(old)} layers.")
    new = nn.ModuleList()
    used: set[int] = set()
    for position, number in enumerate(numbers):
        layer = clone_module(old[number], share_weights=True) if number in used else old[number]
        used.add(number)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # caches are indexed by it
        new.append(layer)
    setattr(owner, attribute, new)
    if getattr(model, "config", None) is not None and hasattr(model.config, "num_hidden_layers"):
        model.config.num_hidden_layers = len(new)
        layer_types = getattr(model.config, "layer_types", None)
        if layer_types is not None:
            model.config.layer_types = [layer_types[number] for number in numbers]


def _find_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's attribute name."""
    for module in model.modules():
        for attribute in ("layers", "h", "layer"):
            if isinstance(getattr(module, attribute, None), nn.ModuleList):
                return module, attribute
    raise ValueError(f"layer_replication: found no list of layers (layers, h or layer) in {type(model).__name__}.")
