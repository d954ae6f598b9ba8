# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA and DoRA beside a base layer that tensor parallelism split by columns or rows (arXiv 1909.08053, section 3).

Adapters stay whole on every process, as they are saved: each process uses the part that meets its part of the base
weight, and their gradients, which are small, are summed over the processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from peft.weights import shards_of


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the processes of a group."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group, whose gradient is the same on each."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        tensor = tensor.contiguous().clone()
        torch.distributed.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class Split(NamedTuple):
    """This process's part of a layer, where its input or its output is not whole.

    Args:
        out: The output features of the output, None where it is whole.
        features: The input features of the input, None where it is whole.
        group: The processes that have the other parts.
    """

    out: slice | None
    features: slice | None
    group: Any

    def vector(self, vector: torch.Tensor) -> torch.Tensor:
        """The part of a trained vector `[out]` that the output needs."""
        return vector if self.out is None else _SumGradient.apply(vector, self.group)[self.out]

    def constant(self, vector: torch.Tensor) -> torch.Tensor:
        """The same of a vector without gradient."""
        return vector if self.out is None else vector[self.out]

    def low_rank(
        self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """B A x + c in the output's part: `x [..., features]`, `a [r, in]`, `b [out, r]` and `bias [out]` are whole."""
        if self.features is not None:
            h = _Sum.apply(F.linear(x, _SumGradient.apply(a, self.group)[:, self.features]), self.group)
        else:
            h = F.linear(x, a)
        if self.out is None:
            return F.linear(h, b, bias)
        h, b = _SumGradient.apply(h, self.group), _SumGradient.apply(b, self.group)[self.out]
        return F.linear(h, b, None if bias is None else self.vector(bias))


def split_of(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Split | None:
    """How a linear base layer is split, told by its input `x [..., in]` and output `y [..., out]`; None where it is not.

    Raises:
        ValueError: The shapes are not this process's part of the weight: it is split in a way that is not known.
    """
    out, features = y.shape[-1], x.shape[-1]
    if out == layer.out_features and features == layer.in_features:
        return None
    shards = shards_of(layer.get_base_layer())
    pieces = [] if shards is None else layer.norm_weight().pieces()
    if len(pieces) == 1 and len(shards.groups) == 1:
        piece = pieces[0]
        rows, columns = piece.shape
        if (out, features) in ((rows, layer.in_features), (layer.out_features, columns)):
            of_out = None if out == layer.out_features else slice(piece.row, piece.row + rows)
            of_in = None if features == layer.in_features else slice(piece.column, piece.column + columns)
            return Split(of_out, of_in, shards.groups[0])
    raise ValueError(
        f"a base layer of {layer.in_features} input and {layer.out_features} output features gave an output of shape "
        f"{tuple(y.shape)} for an input of shape {tuple(x.shape)}, and its weight is not split to match along one mesh "
        "dimension: shard the layer with ColwiseParallel or RowwiseParallel, or leave it out of target_modules"
    )
