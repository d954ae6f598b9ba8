# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA on weights that a module reads by itself, one matrix or a stack of them: g∘(W + s·BA), made while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .norm import _exact_products
from .reference import gain as gain_of
from .reference import over_norm


def stacked_norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + s·BA‖ by matrix and row, without gradient; one dense matrix lives at a time.

    Args:
        W: Base weights `[n, out, in]`.
        A: `[n, r, in]`.
        B: `[n, out, r]`.
        scaling: s.

    Returns:
        `[n, out]`, float32, or float64 if one of them is.
    """
    W, A, B = W.detach(), A.detach(), B.detach()
    if torch.compiler.is_compiling():
        from . import ops

        return torch.stack([ops.row_norm(w, a, b, scaling, False) for w, a, b in zip(W, A, B, strict=True)])
    with _exact_products(W.device.type):
        return torch.stack(
            [torch.linalg.vector_norm(_sum(w, a, b, scaling), dim=1) for w, a, b in zip(W, A, B, strict=True)]
        )


def stacked_weight(
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    magnitude: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """g∘(W + s·BA) by matrix and row, with g = magnitude / norm; the gradient reaches all but the norm.

    Nothing dense is saved but W, by reference: the backward pass forms W + s·BA once more, a matrix at a time.

    Args:
        W: Weights `[n, out, in]`.
        A: `[n, r, in]`.
        B: `[n, out, r]`.
        magnitude: m, `n · out` elements of any shape.
        norm: `[n, out]`, as `stacked_norm` gives it.
        scaling: s.

    Returns:
        `[n, out, in]` in W's dtype.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        wide = norm.dtype
        total = W.to(wide) + scaling * (B.to(wide) @ A.to(wide))
        return (gain_of(magnitude, norm.detach().flatten()).view_as(norm).unsqueeze(-1) * total).to(W.dtype)
    return StackedFunction.apply(W, A, B, magnitude, norm.detach(), scaling)


class StackedFunction(torch.autograd.Function):
    """`stacked_weight` with its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        W: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        magnitude: torch.Tensor,
        norm: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        gain = gain_of(magnitude, norm.flatten()).view_as(norm)
        out = torch.empty_like(W)
        with _exact_products(W.device.type):
            for i, g in enumerate(gain):
                out[i] = _sum(W[i], A[i], B[i], scaling).mul_(g[:, None])
        ctx.save_for_backward(W, A, B, magnitude, norm)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        W, A, B, magnitude, norm = ctx.saved_tensors
        need_w, need_a, need_b, need_m = ctx.needs_input_grad[:4]
        gain = gain_of(magnitude, norm.flatten()).view_as(norm)
        dw, da, db = (torch.empty_like(t) if need else None for t, need in ((W, need_w), (A, need_a), (B, need_b)))
        dm = torch.zeros_like(norm) if need_m else None
        with _exact_products(W.device.type):
            for i, g in enumerate(gain):
                dy = dweight[i].to(norm.dtype)
                if need_m:
                    total = _sum(W[i], A[i], B[i], ctx.scaling).mul_(dy).sum(1)
                    dm[i] = over_norm(total, norm[i])
                t = dy * g[:, None]
                if need_w:
                    dw[i] = t
                if need_a:
                    da[i] = ctx.scaling * (B[i].to(t).t() @ t)
                if need_b:
                    db[i] = ctx.scaling * (t @ A[i].to(t).t())
        return dw, da, db, None if dm is None else dm.view(magnitude.shape).to(magnitude.dtype), None, None


def _sum(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """w + s·b a `[out, in]` in a new tensor, in float32, or float64 if one of them is."""
    wide = torch.float64 if torch.float64 in (w.dtype, a.dtype, b.dtype) else torch.float32
    return torch.addmm(w.to(wide), b.to(wide), a.to(wide), alpha=scaling)
