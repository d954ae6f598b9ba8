# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Where NaN and infinity are: in which layer, in which of its parameters or their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

_SHOWN = 10


def check_finite(model: nn.Module) -> None:
    """Raise an error that names every place where an adapter or a gradient is not finite.

    Looked at are the parameters that the layers with adapters hold beside their base layer (factors, magnitudes, biases
    of B), trained or not, and all that is trained elsewhere, with their gradients. It waits for the device once, so
    call it after `loss.backward()` while looking for a fault, not in every step.

    Args:
        model: Any module; layers with adapters are found by their method `dora_routes`.

    Raises:
        FloatingPointError: Something is not finite; the message gives layer, parameter and counts.
    """
    places = list(_places(model))
    bad = [~torch.isfinite(tensor.detach()) for _, tensor in places]
    found = [place for (place, _), flag in zip(places, _any(bad), strict=True) if flag]
    if not found:
        return
    tensors = dict(places)
    lines = [f"{place}: {_count(tensors[place])}" for place in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more")
    raise FloatingPointError("Not finite:\n  " + "\n  ".join(lines))


def _places(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What is looked at, by its description."""
    held: set[int] = set()
    for layer_name, layer in model.named_modules():
        if not callable(getattr(layer, "dora_routes", None)):
            continue
        for name, parameter in layer.named_parameters():
            if name.startswith("base_layer.") or id(parameter) in held:
                continue
            held.add(id(parameter))
            yield from _values(f"{name} in {layer_name or type(layer).__name__}", parameter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            layer_name, _, own = name.rpartition(".")
            yield from _values(f"{own} in {layer_name or type(model).__name__}", parameter)


def _values(where: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if parameter.is_meta:
        return
    if parameter.is_floating_point() or parameter.is_complex():
        yield where, parameter
    if parameter.grad is not None:
        grad = parameter.grad
        yield f"gradient of {where}", grad.coalesce().values() if grad.is_sparse else grad


def _any(bad: list[torch.Tensor]) -> list[bool]:
    """Whether each mask holds a True, read from each device at once."""
    flags: list[bool] = [False] * len(bad)
    for device in {mask.device for mask in bad}:
        indices = [i for i, mask in enumerate(bad) if mask.device == device]
        for i, flag in zip(indices, torch.stack([bad[i].any() for i in indices]).tolist(), strict=True):
            flags[i] = flag
    return flags


def _count(tensor: torch.Tensor) -> str:
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()}"
