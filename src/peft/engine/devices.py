# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Where parameters live: new adapters beside their base weight, offloaded layers brought in and put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import offload_state_dict
from torch import nn

if TYPE_CHECKING:
    from .layer import BaseTunerLayer

META = torch.device("meta")


def base_placement(layer: BaseTunerLayer) -> tuple[torch.device | None, torch.dtype | None]:
    """Device of the base weight and its dtype; of a packed weight the dtype that it computes in, None if it has none."""
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
            return weight.device, weight.dtype if floating else getattr(base_layer, "compute_dtype", None)
    first = next(iter(base_layer.parameters()), None)
    return (None, None) if first is None else (first.device, None)


def move_slot_to_base_layer(
    layer: BaseTunerLayer, adapter_name: str, device: torch.device | None = None, keep_dtype: bool = False
) -> None:
    """Move one adapter's parameters to the base weight's device (or `device`) and, unless `keep_dtype`, floating dtype.

    Parameters on the meta device stay there: they are filled by loading. An offloaded base weight (meta) gives no
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
        if name in ("", "base_layer"):
            continue
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.offload:
            hook.pre_forward(module)
            onloaded.append(module)
    base_layer = getattr(layer, "base_layer", None)
    base_hook = getattr(base_layer, "_hf_hook", None)
    base_onloaded = isinstance(base_hook, AlignDevicesHook) and base_hook.offload
    if base_onloaded:
        base_hook.pre_forward(base_layer)
    try:
        yield
    finally:
        for module in onloaded:
            module._hf_hook.post_forward(module, torch.tensor([]))
        if base_onloaded:
            # the weights map keeps the old values: give it what a merge changed before the layer goes away again
            base_hook.weights_map = _with_current_values(base_hook, base_layer)
            base_hook.post_forward(base_layer, torch.tensor([]))


def _with_current_values(hook: AlignDevicesHook, module: nn.Module):
    """The hook's weights map with the module's present tensors in it."""
    weights_map = hook.weights_map
    current = {name: tensor.detach().to("cpu") for name, tensor in module.state_dict().items()}
    dataset = getattr(weights_map, "dataset", weights_map)
    prefix = getattr(weights_map, "prefix", "")
    folder = getattr(dataset, "save_folder", None)
    if folder is not None:
        _rewrite_on_disk(dataset, folder, prefix, current)
    else:
        store = getattr(dataset, "state_dict", dataset)
        for name, tensor in current.items():
            store[prefix + name] = tensor
    return weights_map


def _rewrite_on_disk(dataset, folder: str, prefix: str, current: dict[str, torch.Tensor]) -> None:
    """Write a layer's present values into accelerate's offload folder, and drop its pointer to the original file."""
    offload_state_dict(os.fspath(folder), {prefix + name: tensor for name, tensor in current.items()})
    for name, tensor in current.items():
        entry = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        dataset.index[prefix + name] = entry
