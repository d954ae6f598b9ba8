# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Where parameters live: new adapters beside their base weight, offloaded layers brought in and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from peft.weights.offloaded import offload_hook, put

if TYPE_CHECKING:
    from .layer import BaseTunerLayer

META = torch.device("meta")


def base_placement(layer: BaseTunerLayer) -> tuple[torch.device | None, torch.dtype | None]:
    """Device of the base weight and its dtype; of a packed weight the dtype that it computes in, None if it has none.

    The device of an offloaded base weight is the one that accelerate runs it on.
    """
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, nn.MultiheadAttention):
        base_layer = base_layer.out_proj
    if hasattr(layer, "get_param"):  # one parameter of it is adapted, which may have any name
        parameter = layer.get_param()
        return parameter.device, parameter.dtype if parameter.dtype.is_floating_point else None
    for attribute in ("weight", "qweight", "W_q", "weight_packed", "in_proj_weight"):
        weight = getattr(base_layer, attribute, None)
        if isinstance(weight, torch.Tensor):
            # float8 is a storage format, in which no adapter can be trained
            floating = (weight.dtype.is_floating_point and weight.dtype.itemsize > 1) or weight.dtype.is_complex
            hook = offload_hook(base_layer) if weight.is_meta else None
            away = hook is not None and hook.execution_device is not None
            device = torch.device(hook.execution_device) if away else weight.device
            return device, weight.dtype if floating else getattr(base_layer, "compute_dtype", None)
    first = next(iter(base_layer.parameters()), None)
    return (None, None) if first is None else (first.device, None)


def base_device_of(layer: BaseTunerLayer) -> torch.device | None:
    """The device of the base weight, with its index; None if there is no base weight."""
    device, _ = base_placement(layer)
    return None if device is None else torch.empty(0, device=device).device


class Apart(NamedTuple):
    """An adapter's slot that is not where the base weight is: where the two are, in words, and whether one has no values."""

    why: str
    empty: bool


def apart_from_base(layer: BaseTunerLayer, names: Iterable[str]) -> list[Apart]:
    """The slots of the named adapters that are not where the base weight is; what is on the meta device has no values.

    What accelerate brings in for each call counts as being there.
    """
    base_device = base_device_of(layer)
    if base_device is None:
        return []
    apart = []
    for name in names:
        for attribute, slot in layer._slots():
            if name not in slot:
                continue
            entry = slot[name]
            modules = entry.modules() if isinstance(entry, nn.Module) else ()
            if any(offload_hook(module) is not None for module in modules):
                continue
            tensors = entry.parameters() if isinstance(entry, nn.Module) else (entry,)
            devices = {tensor.device for tensor in tensors} - {base_device}
            if devices:
                where = ", ".join(map(str, devices))
                why = f"{attribute} of adapter {name!r} is on {where}, the base weight on {base_device}"
                apart.append(Apart(why, META in {base_device, *devices}))
    return apart


@contextmanager
def brought_to_base(layer: BaseTunerLayer, device: torch.device) -> Iterator[bool]:
    """For as long as it lasts the layer's adapters are on `device`, whose gradients go to where they were before.

    Yields whether any was elsewhere. What is on the meta device stays there.
    """
    taken = []
    for name, child in layer._modules.items():
        for module in () if child is None or name == "base_layer" else child.modules():
            for tensors in (module._parameters, module._buffers):
                taken += [(tensors, key, tensor) for key, tensor in tensors.items() if _is_elsewhere(tensor, device)]
    for tensors, key, tensor in taken:
        tensors[key] = tensor.to(device)
    try:
        yield bool(taken)
    finally:
        for tensors, key, tensor in taken:
            tensors[key] = tensor


def _is_elsewhere(tensor: torch.Tensor | None, device: torch.device) -> bool:
    return tensor is not None and not tensor.is_meta and tensor.device != device


def move_slot_to_base_layer(
    layer: BaseTunerLayer, adapter_name: str, device: torch.device | None = None, keep_dtype: bool = False
) -> None:
    """Move one adapter's parameters to the base weight's device (or `device`) and, unless `keep_dtype`, floating dtype.

    Parameters on the meta device stay there: they are filled by loading. A base weight without values (meta) gives no
    device, so the adapter stays where it was made.
    """
    base_device, dtype = base_placement(layer)
    dtype = None if keep_dtype else dtype
    if device is None:
        device = base_device
    if device is None or device == META:
        return
    for _, slot in layer._slots():
        if adapter_name not in slot:
            continue
        if any(tensor.device == META for tensor in layer._slot_parameters(adapter_name)):
            continue
        entry = slot[adapter_name]
        if isinstance(entry, nn.Module):
            entry.to(device=device) if dtype is None else entry.to(device=device, dtype=dtype)
        elif isinstance(entry, nn.Parameter):
            entry.data = entry.data.to(device=device) if dtype is None else entry.data.to(device=device, dtype=dtype)
        else:
            slot[adapter_name] = entry.to(device=device)


def get_device_map(model: nn.Module) -> dict:
    """The device map that accelerate dispatched `model` with, also when it sits inside a wrapper."""
    candidates = (model, getattr(model, "model", None), getattr(getattr(model, "base_model", None), "model", None))
    for candidate in candidates:
        device_map = getattr(candidate, "hf_device_map", None)
        if device_map is not None:
            return device_map
    raise ValueError("The model has no hf_device_map: it was not dispatched over devices by accelerate.")


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Bring a layer that accelerate offloaded (CPU or disk) in for the block, and put what changed back afterwards."""
    onloaded = []
    for name, module in layer.named_modules():
        hook = None if name == "" else offload_hook(module)
        if hook is not None:
            hook.pre_forward(module)
            onloaded.append((name, module, hook))
    try:
        yield
    finally:
        for name, module, hook in onloaded:
            if set(name.split(".")) == {"base_layer"}:
                # the store has the old values: give it what a merge changed before the layer goes away again
                put(hook, module.state_dict())
            hook.post_forward(module, torch.tensor([]))
