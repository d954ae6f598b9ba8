# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What a layer's own forward pass tells about its weight, and the gradient of forward passes that record none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .base import BaseWeight

CHUNK_BYTES = 32 * 2**20  # half of what the norm may hold, which holds the rows too


def read_through(
    product: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, int],
    rows: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Rows of W, read by multiplying chunks of the identity: W[:, j] is the product of the j-th unit vector.

    Each product is one element of W times one, so nothing is lost where the format does not round its input: formats
    that do cannot be read like this.

    Args:
        product: x [n, in] to x Wᵀ [n, out], without bias.
        shape: (out, in).
        rows: First row, and the one behind the last.
        dtype: What `product` takes.
        device: Where.

    Returns:
        `[rows, in]` in the dtype that `product` gives. A chunk of the identity and its product take 32 MiB at most.
    """
    (out, features), (a, b) = shape, rows
    step = max(1, CHUNK_BYTES // (dtype.itemsize * (out + features)))
    matrix = None
    for start in range(0, features, step):
        size = min(step, features - start)
        unit = torch.zeros(size, features, dtype=dtype, device=device)
        unit.diagonal(start).fill_(1)
        columns = product(unit)[:, a:b].T
        if matrix is None:
            matrix = columns.new_empty(b - a, features)
        matrix[:, start : start + size] = columns  # a copy, so that the product of this step goes before the next one
        del unit, columns
    return matrix


class _StraightThrough(torch.autograd.Function):
    """y = layer(x); dx = dy W and db = Σ dy, whatever rounding the layer does on its way."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: nn.Module, weight: BaseWeight
    ) -> torch.Tensor:
        ctx.weight, ctx.dtypes = weight, (x.dtype, None if bias is None else bias.dtype)
        return layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_dtype, bias_dtype = ctx.dtypes
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ ctx.weight.dense(dy.dtype)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0).to(bias_dtype)
        return dx, db, None, None


def straight_through(layer: nn.Module, weight: BaseWeight, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, with the gradient of the exact product for its input, and that of its bias.

    Rounding the input (as int8 and float8 products do) has no derivative of use: as in training with quantised
    activations, it counts as the identity (arXiv 1308.3432).

    Args:
        layer: The base layer.
        weight: Its weight.
        x: `[..., in]`.
    """
    return _StraightThrough.apply(x, weight.bias, layer, weight)
