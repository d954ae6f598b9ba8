# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA in pieces, for layers whose base product is not ours to make: the gain on top of a base output that is there
already, and the branch that dropout sends through a second input."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .call import Call, find_call
from .factors import Factors, plain_factors
from .norm import CHUNK_BYTES, check_factors
from .products import as_dtype, autocast_dtype, product_in, scaled_product, sum_dtype
from .reference import gain as gain_of
from .reference import over_norm
from .route import Route


def compose(
    base_out: torch.Tensor,
    lora_out: torch.Tensor,
    *,
    magnitude: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    channel_dim: int = -1,
) -> torch.Tensor:
    """y = g∘(base_out − b + s·lora_out) + b, the gain along one dimension; sums in the norm's dtype, rounded once.

    The gradient reaches everything but the norm.

    Args:
        base_out: The base layer's output, bias included, any shape.
        lora_out: B A x of the same shape, not scaled.
        magnitude: m, `channels` elements of any shape.
        norm: ‖W + s·BA‖ `[channels]`, float32 or float64.
        scaling: s.
        bias: b `[channels]`, the base layer's.
        channel_dim: The output features' dimension.

    Returns:
        As base_out, in its shape and dtype.

    Raises:
        ValueError: The shapes differ, or the channels are not as many as the norms.
    """
    if base_out.shape != lora_out.shape or base_out.shape[channel_dim] != len(norm):
        raise ValueError(
            f"base_out {tuple(base_out.shape)} and lora_out {tuple(lora_out.shape)} must have one shape, with "
            f"{len(norm)} channels, as many as norms, in dimension {channel_dim}"
        )
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        shape = _channel_shape(base_out, channel_dim)
        shift = 0.0 if bias is None else bias.view(shape)
        gain = gain_of(magnitude, norm.detach()).view(shape)
        return as_dtype(gain * (base_out - shift + scaling * lora_out) + shift, base_out.dtype)
    return ComposeFunction.apply(base_out, lora_out, magnitude, bias, norm.detach(), scaling, channel_dim)


def _channel_shape(tensor: torch.Tensor, channel_dim: int) -> list[int]:
    shape = [1] * tensor.dim()
    shape[channel_dim] = -1
    return shape


def _adapted(
    base_out: torch.Tensor, lora_out: torch.Tensor, bias: torch.Tensor | None, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """v = base_out − b + s·lora_out, in a new tensor of `dtype`."""
    if bias is None:
        return torch.add(as_dtype(base_out, dtype), lora_out, alpha=scaling)
    return (as_dtype(base_out, dtype) - bias).add_(lora_out, alpha=scaling)


class ComposeFunction(torch.autograd.Function):
    """`compose` with its backward pass; it saves its two inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        base_out: torch.Tensor,
        lora_out: torch.Tensor,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
        norm: torch.Tensor,
        scaling: float,
        channel_dim: int,
    ) -> torch.Tensor:
        shape = _channel_shape(base_out, channel_dim)
        gain = gain_of(magnitude, norm).view(shape)
        wide = torch.promote_types(norm.dtype, base_out.dtype)
        shift = None if bias is None else bias.to(wide).view(shape)
        y = _adapted(base_out, lora_out, shift, scaling, wide).mul_(gain)
        if shift is not None:
            y.add_(shift)
        wants_magnitude = ctx.needs_input_grad[2]
        ctx.save_for_backward(base_out if wants_magnitude else None, lora_out if wants_magnitude else None)
        ctx.gain, ctx.norm, ctx.shift, ctx.scaling = gain, norm, shift, scaling
        ctx.like = base_out.dtype, lora_out.dtype, magnitude, bias
        ctx.others = [i for i in range(base_out.dim()) if i != channel_dim % base_out.dim()]
        return as_dtype(y, base_out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        base_out, lora_out = ctx.saved_tensors
        base_dtype, lora_dtype, magnitude, bias = ctx.like
        need_base, need_lora, need_m, need_bias = ctx.needs_input_grad[:4]
        gain, norm, scaling = ctx.gain, ctx.norm, ctx.scaling
        wide = torch.promote_types(norm.dtype, dy.dtype)
        others = ctx.others
        t = as_dtype(dy, wide) * gain if need_base or need_lora else None
        dbase = as_dtype(t, base_dtype) if need_base else None
        dlora = as_dtype(t * scaling, lora_dtype) if need_lora else None
        dm = dbias = None
        if need_m:
            v = _adapted(base_out, lora_out, ctx.shift, scaling, wide)
            total = v.mul_(dy).sum(others).flatten()
            dm = over_norm(total, norm).to(magnitude.dtype).view(magnitude.shape)
        if need_bias:
            dbias = ((1 - gain) * dy).sum(others).to(bias.dtype).view(bias.shape)
        return dbase, dlora, dm, dbias, None, None, None


def branch(
    x: torch.Tensor,
    weight: Any,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scaling: float,
    magnitude: torch.Tensor,
    norm: torch.Tensor,
    lora_bias: torch.Tensor | None = None,
    route: Route | None = None,
) -> torch.Tensor:
    """(g − 1)∘(W x) + g∘s·(B A x + c): what DoRA adds to the base layer's output where x comes out of a dropout.

    Args:
        x: `[..., in]`, after dropout.
        weight: W `[out, in]`, as a `peft.weights.BaseWeight`.
        A: `[r, in]`.
        B: `[out, r]`.
        scaling: s.
        magnitude: m, `out` elements.
        norm: ‖W + s·BA‖ `[out]`, float32 or float64.
        lora_bias: c `[out]`.
        route: Which body reads a packed weight; None for PyTorch.

    Returns:
        `[..., out]` in the dtype that the base layer would return.

    Raises:
        ValueError: The shapes of x, A or B do not fit the weight's.
        RuntimeError: The dtypes of x and W differ outside autocast; or a second derivative is asked for.
    """
    check_factors(weight, A, B)
    call = find_call(x, weight, A, B, scaling, None, route)
    if call.triton:
        call.packed = weight.packed()
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        dtype = call.branch_dtype
        x = as_dtype(x, call.dtype)
        base = torch.nn.functional.linear(x, call.dense())
        low_rank = as_dtype(x, dtype) @ as_dtype(A, dtype).t() @ as_dtype(B, dtype).t()
        low_rank = scaling * (low_rank if lora_bias is None else low_rank + as_dtype(lora_bias, dtype))
        gain = gain_of(magnitude, norm.detach())
        return as_dtype((gain - 1) * base + gain * low_rank, call.dtype)
    return BranchFunction.apply(x, A, B, magnitude, lora_bias, norm.detach(), call)


def _row_chunks(rows: int, columns: int, copies: int, itemsize: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // (copies * itemsize * max(columns, 1)))
    return [slice(start, start + step) for start in range(0, rows, step)]


class BranchFunction(torch.autograd.Function):
    """`branch` with its backward pass; for the magnitude's gradient it saves W x + s·(B A x + c)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        magnitude: torch.Tensor,
        lora_bias: torch.Tensor | None,
        norm: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        factors: Factors = plain_factors(A, B, call.branch_dtype)
        used = as_dtype(x, call.dtype)
        rows = used.reshape(-1, x.shape[-1])
        gain = gain_of(magnitude, norm)
        u = torch.mm(rows, call.dense().t())
        h = scaled_product(as_dtype(rows, call.branch_dtype), factors.a.t(), call.scaling)
        z = torch.mm(h, factors.b.t())
        if lora_bias is not None:
            z.add_(lora_bias.detach() * call.scaling)
        y = torch.empty_like(u)
        v = torch.empty_like(u) if ctx.needs_input_grad[3] else None
        for cut in _row_chunks(*u.shape, 4, gain.itemsize):
            base, low_rank = as_dtype(u[cut], gain.dtype), as_dtype(z[cut], gain.dtype)
            y[cut] = ((gain - 1) * base).addcmul_(gain, low_rank)
            if v is not None:
                v[cut] = base + low_rank
        ctx.save_for_backward(used if ctx.needs_input_grad[1] else None, h, v, factors.a, factors.b)
        ctx.call, ctx.gain, ctx.norm = call, gain, norm
        ctx.like = x.shape, x.dtype, A.dtype, B.dtype, magnitude, lora_bias
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kind = dy.device.type
        if autocast_dtype(kind) is not None:
            with torch.autocast(kind, enabled=False):
                return _branch_backward(ctx, dy)
        return _branch_backward(ctx, dy)


def _branch_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, h, v, a, b = ctx.saved_tensors
    call, gain, norm = ctx.call, ctx.gain, ctx.norm
    shape, x_dtype, a_dtype, b_dtype, magnitude, lora_bias = ctx.like
    need_x, need_a, need_b, need_m, need_c = ctx.needs_input_grad[:5]
    dy = dy.reshape(-1, dy.shape[-1])
    t = torch.mul(dy, gain, out=torch.empty_like(dy, dtype=call.branch_dtype))
    da = db = dx = dc = dm = None
    if need_b:
        db = product_in(t.t(), h, b_dtype)
    if need_c:
        dc = (call.scaling * gain * dy.sum(0, dtype=sum_dtype(dy))).to(lora_bias.dtype)
    if need_m:
        total = torch.zeros_like(norm)
        for cut in _row_chunks(*dy.shape, 3, norm.itemsize):
            total += (as_dtype(dy[cut], norm.dtype) * v[cut]).sum(0)
        dm = over_norm(total, norm).to(magnitude.dtype).view(magnitude.shape)
    if need_a or need_x:
        dh = scaled_product(t, b, call.scaling)
        if need_a:
            da = product_in(dh.t(), as_dtype(x.reshape(-1, shape[-1]), dh.dtype), a_dtype)
        if need_x:
            base_gradient = torch.mul(dy, gain - 1, out=torch.empty_like(dy, dtype=call.dtype))
            dx, _ = call.product_gradients(base_gradient, dh, a, None, a.dtype)
            dx = dx.to(x_dtype).view(shape)
    return dx, da, db, dm, dc, None, None
