# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Where other libraries meet the models that adapters go into: DeepSpeed ZeRO-3, accelerate's empty weights and
device maps, tensor parallelism, and the weights of quantised layers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import accelerate
import torch
from torch import nn

from peft.weights import find_weight
from peft.weights.bnb import dequantise_4bit, dequantise_8bit, int8_state_of, quant_state_of

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh


@dataclass
class TpInfo:
    """How a model is split by tensor parallelism.

    Attributes:
        tp_plan: Style of each module, by name pattern.
        device_mesh: The mesh that the weights are placed on.
        tp_size: Number of ranks that share a weight.
    """

    tp_plan: dict[str, str]
    device_mesh: DeviceMesh
    tp_size: int


def dtensor_from_local_like(local_tensor: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """A DTensor of `ref`'s mesh, placements, shape and stride around this rank's part of it.

    Args:
        local_tensor: This rank's shard, an ordinary tensor.
        ref: The DTensor to be like.
    """
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local_tensor, ref.device_mesh, ref.placements, run_check=False, shape=ref.shape, stride=ref.stride()
    )


def check_deepspeed_zero3_enabled() -> bool:
    """True when transformers runs under a DeepSpeed configuration of stage 3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """While it is open, parameters that ZeRO-3 has partitioned are whole on every rank; elsewhere it does nothing.

    Args:
        param: One parameter or several.
        modifier_rank: The rank whose changes the others get when the context closes; None when nothing is changed.
        fwd_module: The module in whose forward this runs, so that DeepSpeed registers the parameters there.
    """
    if not isinstance(param, torch.Tensor):
        param = list(param)
    given = [param] if isinstance(param, torch.Tensor) else param
    # A model that deepspeed.zero.Init made is partitioned without transformers knowing of it.
    if check_deepspeed_zero3_enabled() or any(hasattr(each, "ds_id") for each in given):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module)
    else:
        whole = nullcontext()
    with whole:
        yield


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Whether a parameter is bitsandbytes' `Params4bit` ("4bit"), its `Int8Params` ("8bit"), or neither (False)."""
    names = {kind.__name__ for kind in type(param).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    if "Params4bit" in names:
        return "4bit"
    return "8bit" if "Int8Params" in names else False


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a layer in floating point, in the layer's own orientation.

    Args:
        module: An ordinary, bitsandbytes, torchao or HQQ layer.

    Returns:
        The layer's own parameter where it is not quantised, else a new tensor without gradient.

    Raises:
        TypeError: The layer keeps its weight in a format that is not supported.
    """
    found = find_weight(module)
    return found.dense() if found.lossy else module.weight


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> torch.Tensor:
    """The matrix [out, in] of a bitsandbytes parameter: in the dtype it was quantised from for 4 bit, float32 for 8 bit.

    Args:
        weight: A `Params4bit` or `Int8Params`. One that is not quantised yet comes back as it is.
        state: The `MatmulLtState` of the 8-bit layer, which holds the row statistics after the first forward.

    Raises:
        TypeError: It is neither of the two.
        ValueError: An 8-bit weight without statistics, and no `state` that has them.
    """
    kind = get_bnb_param_type(weight)
    if kind == "4bit":
        quant_state = quant_state_of(weight)
        return weight.detach() if quant_state is None else dequantise_4bit(weight, quant_state)
    if kind == "8bit":
        stored = int8_state_of(weight, state)
        return weight.detach() if stored is None else dequantise_8bit(*stored)
    raise TypeError(f"weight must be a Params4bit or Int8Params of bitsandbytes, got {type(weight).__name__}")


# How parameters were registered outside the contexts of `init_empty_weights` that are open now, the outermost first.
_outer_registrations: list[Callable] = []


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """While it is open, new parameters are made on the meta device. What `skip_init_on_device` marks is left out.

    Args:
        include_buffers: Make new buffers there too; None leaves it to accelerate's environment variable.
    """
    _outer_registrations.append(nn.Module.register_parameter)
    try:
        with accelerate.init_empty_weights(include_buffers=include_buffers):
            yield
    finally:
        _outer_registrations.pop()


def skip_init_on_device(func: Callable) -> Callable:
    """Decorator: parameters that `func` makes are real ones, also inside `init_empty_weights`."""

    @functools.wraps(func)
    def on_the_real_device(*args: Any, **kwargs: Any) -> Any:
        if not _outer_registrations:
            return func(*args, **kwargs)
        inner = nn.Module.register_parameter
        nn.Module.register_parameter = _outer_registrations[0]
        try:
            return func(*args, **kwargs)
        finally:
            nn.Module.register_parameter = inner

    return on_the_real_device


_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def get_layer_device_map(model: nn.Module) -> dict[int, int | str] | None:
    """The device of each hidden layer of a dispatched model; None where there is no `hf_device_map`.

    A layer that is offloaded to "cpu" or "disk" runs on the main device, the first one that is neither of the two.

    Raises:
        RuntimeError: The map says nothing about one of the layers.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return None
    main_device = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
    num_layers = model.config.get_text_config().num_hidden_layers
    stack = _name_of_layer_stack(model, num_layers)
    devices = {}
    for index in range(num_layers):
        device = _device_of_layer(device_map, stack, index)
        if device is None:
            raise RuntimeError(f"hf_device_map has no device for layer {index}: {device_map}")
        devices[index] = main_device if device in ("cpu", "disk") else device
    return devices


def _name_of_layer_stack(model: nn.Module, num_layers: int) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    return None


def _device_of_layer(device_map: dict, stack: str | None, index: int) -> Any:
    """Of the entries for a layer the longest one that covers it, else the last one inside it, else one by its number."""
    inside = [name for name in device_map if (found := _LAYER_INDEX.search(name)) and int(found[1]) == index]
    if stack is not None:
        parts = [*stack.split("."), str(index)] if stack else [str(index)]
        for length in range(len(parts), -1, -1):
            name = ".".join(parts[:length])
            if name in device_map:
                return device_map[name]
        inside = [name for name in device_map if name.startswith(".".join(parts) + ".")] or inside
    return device_map[inside[-1]] if inside else device_map.get("")


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """Move the keys and values of each layer's cache, in place, to the device where the layer is.

    Does nothing for a model that is not dispatched to several devices, and for anything that is not a transformers
    cache.

    Args:
        model: The base model.
        cache: A `Cache` of transformers, or an `EncoderDecoderCache`, whose two halves are both moved.
    """
    from transformers import Cache, EncoderDecoderCache

    if not isinstance(cache, Cache):
        return
    devices = get_layer_device_map(model)
    if devices is None:
        return
    if isinstance(cache, EncoderDecoderCache):
        halves = [cache.self_attention_cache, cache.cross_attention_cache]
    else:
        halves = [cache]
    for half in halves:
        for index, layer in enumerate(half.layers):
            if layer.is_initialized:
                layer.keys = layer.keys.to(devices[index])
                layer.values = layer.values.to(devices[index])
