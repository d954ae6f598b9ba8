# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""In which dtype adapters are kept."""

from __future__ import annotations

import torch
from torch import nn

from peft.utils.constants import UPCAST_DTYPES

from .layer import BaseTunerLayer

HALF_DTYPES = (torch.float16, torch.bfloat16)


def _needs_float32(dtype: torch.dtype) -> bool:
    return dtype in HALF_DTYPES or str(dtype).removeprefix("torch.") in UPCAST_DTYPES


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep one adapter's parameters in float32, so that small updates are not lost to rounding.

    Args:
        model: Model whose layers carry the adapter.
        adapter_name: Adapter to cast; the others stay as they are.
        autocast_adapter_dtype: False leaves every dtype as it is, except float8, which cannot be trained.
    """
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for _, slot in module._slots():
            if adapter_name in slot:
                _cast_entry(slot, adapter_name, autocast_adapter_dtype)
        module._replan()


def _cast_entry(slot, adapter_name: str, autocast_adapter_dtype: bool) -> None:
    entry = slot[adapter_name]
    if isinstance(entry, nn.Module):
        for parameter in entry.parameters():
            _cast_tensor(parameter, autocast_adapter_dtype)
    elif isinstance(entry, nn.Parameter):
        _cast_tensor(entry, autocast_adapter_dtype)
    elif autocast_adapter_dtype and _needs_float32(entry.dtype):
        slot[adapter_name] = entry.to(torch.float32)


def _cast_tensor(parameter: nn.Parameter, autocast_adapter_dtype: bool) -> None:
    if not _needs_float32(parameter.dtype):
        return
    if autocast_adapter_dtype or parameter.dtype not in HALF_DTYPES:
        parameter.data = parameter.data.to(torch.float32)
