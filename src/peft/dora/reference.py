# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA's definition in plain PyTorch, for any dtype and device: what the other two bodies are tested against."""

from __future__ import annotations

import torch


def weight_norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + s·BA‖ by rows (Liu et al., arXiv 2402.09353, eq. 5), a constant for the gradient (section 4.3).

    Args:
        W: Base weight `[out, in]`.
        A: `[r, in]`.
        B: `[out, r]`.
        scaling: s.

    Returns:
        `[out]`, in the widest of the dtypes given.
    """
    dtype = torch.promote_types(W.dtype, torch.promote_types(A.dtype, B.dtype))
    W, A, B = (tensor.detach().to(dtype) for tensor in (W, A, B))
    return torch.linalg.vector_norm(W + scaling * (B @ A), dim=1)


def gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """g = magnitude / norm `[out]` in the norm's dtype; 1 where the norm is zero, as such a row is zero anyway.

    Args:
        magnitude: m, `out` elements of any shape; the gradient flows to it.
        norm: `[out]`.
    """
    return over_norm(magnitude.flatten().to(norm.dtype), norm, where_zero=1.0)


def over_norm(
    total: torch.Tensor, norm: torch.Tensor, gain: torch.Tensor | None = None, where_zero: float = 0.0
) -> torch.Tensor:
    """total / norm, or with a gain total / (g∘norm), `[out]`; `where_zero` where the norm is zero."""
    zero = norm == 0
    return torch.where(zero, where_zero, total / torch.where(zero, 1.0, norm if gain is None else norm * gain))


def dora_linear_reference(
    x: torch.Tensor,
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = g∘(x Wᵀ + s·(x Aᵀ Bᵀ + c)) + b, with g = magnitude / ‖W + s·BA‖.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        A: `[r, in]`.
        B: `[out, r]`.
        magnitude: m `[out]`, or None for plain LoRA (g = 1).
        scaling: s.
        bias: b `[out]`, the base layer's.
        lora_bias: c `[out]`, that of B.

    Returns:
        `[..., out]`.
    """
    low_rank = x @ A.T @ B.T
    if lora_bias is not None:
        low_rank = low_rank + lora_bias
    y = x @ W.T + scaling * low_rank
    if magnitude is not None:
        y = gain(magnitude, weight_norm(W, A, B, scaling)) * y
    return y if bias is None else y + bias
