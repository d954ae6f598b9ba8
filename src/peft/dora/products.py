# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The matrix products of an adapted layer, with the dtypes and the scaling where they belong."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on a type of device; None where it is off, and for meta tensors, which it does not know."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, without the call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling · left @ right, the scaling inside the product."""
    if type(left) is not torch.Tensor:
        return left.new_empty((left.shape[0], right.shape[1])).addmm_(left, right, beta=0, alpha=scaling)
    return torch.addmm(_unread(left, left.dtype), left, right, beta=0, alpha=scaling)


def _unread(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    key = like.device, dtype
    found = _UNREAD.get(key)
    if found is None:
        found = _UNREAD[key] = torch.zeros((1, 1), device=like.device, dtype=dtype)
    return found


# With beta=0 the first matrix of addmm is not read; these stand for it.
_UNREAD: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def product_in(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, scaling: float = 1.0) -> torch.Tensor:
    """scaling · left @ right in `dtype`, without rounding in between where the device can."""
    if left.dtype == dtype:
        return torch.mm(left, right) if scaling == 1.0 else scaled_product(left, right, scaling)
    if dtype == torch.float32 and left.is_cuda and torch.version.hip is None:
        if scaling == 1.0:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(_unread(left, dtype), left, right, out_dtype=dtype, beta=0, alpha=scaling)
    return torch.mm(left, right).to(dtype).mul_(scaling)


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which sums over `tensor` are taken."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
