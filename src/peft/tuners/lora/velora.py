# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The autograd function of VeLoRA (Miles et al., arXiv 2405.17991): a linear map that keeps its input compressed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def groups_of(x: torch.Tensor, width: int) -> torch.Tensor:
    """Tokens `[..., features]` in groups `[tokens, groups, width]`, the last one filled up with zeros."""
    tokens = x.reshape(-1, x.shape[-1])
    return F.pad(tokens, (0, -tokens.shape[1] % width)).unflatten(1, (-1, width))


class VeloraFunction(torch.autograd.Function):
    """y = x Wᵀ + b, whose weight gradient comes from one number for each group of input features.

    For backward, each group x_g is kept as its coordinate xᵀ_g v along `embed` and rebuilt as `velora_scale` times
    (xᵀ_g v) v (algorithm 1). The gradients of the input and the bias are exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        embed: torch.Tensor,
        num_groups: int,
        velora_scale: float,
    ) -> torch.Tensor:
        """`input` `[..., in]`, `weight` `[out, in]`, `embed` `[ceil(in / num_groups)]` of norm 1."""
        embed = embed.to(input.dtype)
        ctx.save_for_backward(groups_of(input, embed.numel()) @ embed, weight, embed)
        ctx.velora_scale = velora_scale
        ctx.has_bias = bias is not None
        ctx.input_shape = input.shape
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        coordinates, weight, embed = ctx.saved_tensors  # [tokens, groups], [out, in], [width]
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (rows @ weight).reshape(ctx.input_shape)
        if ctx.needs_input_grad[1]:
            # rows.T @ rebuilt, summed over tokens before it is spread over each group
            summed = rows.t() @ coordinates.to(rows.dtype)  # [out, groups]
            spread = (summed.unsqueeze(-1) * embed.to(rows.dtype)).flatten(1)
            grad_weight = (spread[:, : weight.shape[1]] * ctx.velora_scale).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None


__all__ = ["VeloraFunction", "groups_of"]
