# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The matrix products of an adapted layer, with the dtypes and the scaling where they belong."""

from __future__ import annotations

import torch


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, without the call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def base_product(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows @ matrixᵀ (+ bias) `[tokens, out]`."""
    if bias is None:
        return torch.mm(rows, matrix.t())
    return torch.addmm(as_dtype(bias.detach(), rows.dtype), rows, matrix.t())


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling · left @ right, the scaling inside the product."""
    if type(left) is not torch.Tensor:
        return left.new_empty((left.shape[0], right.shape[1])).addmm_(left, right, beta=0, alpha=scaling)
    key = left.device, left.dtype
    unread = _UNREAD.get(key)
    if unread is None:
        unread = _UNREAD[key] = torch.zeros((1, 1), device=left.device, dtype=left.dtype)
    return torch.addmm(unread, left, right, beta=0, alpha=scaling)


# With beta=0 the first matrix of addmm is not read; these stand for it.
_UNREAD: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def product_in(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`, without rounding in between where the device can."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    if dtype == torch.float32 and left.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which sums over `tensor` are taken."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
