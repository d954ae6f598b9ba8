# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One autograd Function for an adapted linear layer, whichever body runs: base product, branch, gain and bias forward,
and every gradient backward. What it saves and why is in the README beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import eager, memory
from .call import Call, find_call
from .factors import Factors, NormCache
from .norm import check_factors, row_norm_torch
from .products import as_dtype, autocast_dtype, product_in, sum_dtype
from .reference import gain as gain_of
from .route import Route


def linear(
    x: torch.Tensor,
    weight: Any,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scaling: float,
    magnitude: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    cache: NormCache | None = None,
    route: Route | None = None,
) -> torch.Tensor:
    """y = g∘(x Wᵀ + s·(x Aᵀ Bᵀ + c)) + b, with g = magnitude / ‖W + s·BA‖ (arXiv 2402.09353), or g = 1.

    The base product is computed in x's dtype, or in autocast's; the branch in that dtype too, or outside autocast in
    that of A and B where it is wider. Norm and gain are float32 (float64 where something is). The gradient reaches x,
    A, B, the magnitude and both biases, never W. It can be taken once, not differentiated again.

    Args:
        x: `[..., in]`.
        weight: W `[out, in]` and its bias b, as a `peft.weights.BaseWeight`.
        A: `[r, in]`.
        B: `[out, r]`.
        scaling: s.
        magnitude: m, `out` elements; None for plain LoRA.
        lora_bias: c `[out]`.
        cache: Where the norm is kept from pass to pass.
        route: Which body runs; None for PyTorch.

    Returns:
        `[..., out]` in the dtype that the base layer alone would return.

    Raises:
        ValueError: The shapes of x, A or B do not fit the weight's.
        RuntimeError: The dtypes of x and W differ outside autocast; or a second derivative is asked for.
        torch.OutOfMemoryError: There is no room for the pass, and none for it in chunks of tokens either.
    """
    rest = weight, A, B, scaling, magnitude, lora_bias, cache, route
    try:
        return _linear(x, *rest)
    except torch.OutOfMemoryError as error:
        memory.note(error, x)
    return memory.forward_in_chunks(lambda part: _linear(part, *rest), x)


def _linear(
    x: torch.Tensor,
    weight: Any,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    cache: NormCache | None,
    route: Route | None,
) -> torch.Tensor:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # a call that were kept would be new to the next trace: it would be compiled again
        return _composed(find_call(x, weight, A, B, scaling, None, route), x, A, B, magnitude, lora_bias)
    call = find_call(x, weight, A, B, scaling, cache, route)
    bias = weight.bias
    if torch.is_grad_enabled() and (
        x.requires_grad
        or A.requires_grad
        or B.requires_grad
        or (magnitude is not None and magnitude.requires_grad)
        or (lora_bias is not None and lora_bias.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return LinearFunction.apply(x, A, B, magnitude, lora_bias, bias, call)
    return call.run(x, A, B, magnitude, lora_bias, bias, keep=_kept(call, magnitude, bias), record=False)[0]


CHECKPOINT = "torch.utils.checkpoint"


def _kept(call: Call, magnitude: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
    """What the magnitude's gradient reads v from: y itself, or v where y does not hold it well enough.

    y = g∘v + b buries a small v under a large bias, and in float16 a small gain pushes it below the smallest number.
    """
    if magnitude is None or not magnitude.requires_grad:
        return None
    return "y" if bias is None and call.dtype != torch.float16 else "v"


class LinearFunction(torch.autograd.Function):
    """`linear` with its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        magnitude: torch.Tensor | None,
        lora_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
        call: Call,
    ) -> torch.Tensor:
        keep = _kept(call, magnitude, bias)
        y, used, h, v, factors = call.run(x, A, B, magnitude, lora_bias, bias, keep)
        saved = [used if ctx.needs_input_grad[1] or keep == "y" else None, h, v]
        ctx.output, ctx.factors = None, factors
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if y._is_view() or (keep == "y" and y._version):
            # No view, which nobody could change in place, and a version of its own, counted from zero: what is not zero
            # in the backward pass has been written over.
            y = y.data
        if keep == "y":
            if hooks is None:
                ctx.output = y.detach()
            else:
                saved[2] = y
        if hooks is not None and call.cache is not None and hooks[0].__module__ == CHECKPOINT:
            ctx.factors = None  # asked for again when the pass has been run again, so that nothing is held until then
        elif hooks is not None or not factors.private:
            saved += (factors.a, factors.b, factors.stats)
            ctx.factors = factors._replace(a=None, b=None, stats=None)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.keep = call, keep
        ctx.like = x.shape, x.dtype, A.dtype, B.dtype
        ctx.vectors = magnitude, lora_bias, bias
        ctx.parameters = (A, B) if ctx.factors is None else None
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the backward pass is wanted, which raw kernels cannot be part of
            return once_differentiable(_unpack)(ctx, dy)
        return _unpack(ctx, dy)


def _unpack(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The backward pass, with what its forward pass saved."""
    saved = ctx.saved_tensors
    factors = ctx.factors
    if factors is None:
        factors = ctx.call.factors(*ctx.parameters, ctx.vectors[0], floor=ctx.keep == "y")
    elif factors.a is None:
        factors = factors._replace(a=saved[3], b=saved[4], stats=saved[5])
    y = saved[2] if ctx.output is None else ctx.output
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        # These are no saved tensors that autograd lets go of: without this they would live as long as the loss.
        ctx.factors = ctx.output = None
    kind = dy.device.type
    if autocast_dtype(kind) is not None:
        with torch.autocast(kind, enabled=False):
            return _backward(ctx, dy, saved[0], saved[1], y, factors)
    return _backward(ctx, dy, saved[0], saved[1], y, factors)


def _backward(
    ctx: Any, dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, kept: torch.Tensor | None, factors: Factors
) -> tuple[torch.Tensor | None, ...]:
    tensors = dy, x, h, kept
    try:
        return _shaped(ctx, *_gradients(ctx, factors, *tensors))
    except torch.OutOfMemoryError as error:
        memory.note(error, dy)
    return _shaped(ctx, *memory.backward_in_chunks(partial(_gradients, ctx, factors), tensors))


def _shaped(ctx: Any, dx: torch.Tensor | None, *rest: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What `backward` returns, from the gradients in its order."""
    shape, dtype, *_ = ctx.like
    if dx is not None and (dx.shape != shape or dx.dtype != dtype):
        dx = as_dtype(dx, dtype).view(shape)
    return dx, *rest, None


def _gradients(
    ctx: Any, factors: Factors, dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x `[tokens, in]`, A, B, the magnitude and both biases."""
    call: Call = ctx.call
    _, _, a_dtype, b_dtype = ctx.like
    magnitude, lora_bias, bias = ctx.vectors
    need_x, need_a, need_b, need_m, need_c, need_bias = ctx.needs_input_grad[:6]
    kept_is_v = ctx.keep == "v"
    if need_m and not kept_is_v and kept._version:
        kept, kept_is_v = _recompute(call, x, h, factors, lora_bias), True
    call.use(factors.packed)
    need_t = need_x or need_a or need_b
    db = None
    if factors.stats is None:
        t, dm = as_dtype(dy.reshape(-1, dy.shape[-1]), call.branch_dtype), None
    else:
        t, dm, db = call.body.scale_gradient(
            dy if dy.is_contiguous() else dy.contiguous(),
            stats=factors.stats,
            kept=kept if need_m else None,
            kept_is_v=kept_is_v,
            dtype=call.branch_dtype if need_t else None,
            h=h if need_b else None,
            scaling=call.scaling,
            b_dtype=b_dtype,
            launches=call.launches,
        )
    dx = da = dc = None
    if need_b and db is None:
        db = product_in(t.t(), h.view(-1, h.shape[-1]), b_dtype, call.scaling)
    if need_a or need_x:
        dx, da = call.input_gradients(t, factors, x if need_a else None, need_x, a_dtype)
    if dm is not None and (dm.dtype != magnitude.dtype or dm.shape != magnitude.shape):
        dm = dm.to(magnitude.dtype).view(magnitude.shape)
    total = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=sum_dtype(dy)) if need_bias or need_c else None
    dbias = total.to(bias.dtype) if need_bias else None
    if need_c:
        dc = (call.scaling * (total if factors.stats is None else factors.stats[1] * total)).to(lora_bias.dtype)
    return dx, da, db, dm, dc, dbias


def _recompute(
    call: Call, x: torch.Tensor, h: torch.Tensor, factors: Factors, lora_bias: torch.Tensor | None
) -> torch.Tensor:
    """v once more, because the layer's output, from which it would have been read, was changed in place."""
    u, _ = call.products(x, None)
    return eager.compose(u, h, factors.b, stats=None, bias=None, lora_bias=lora_bias, scaling=call.scaling)[0]


def _composed(
    call: Call,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear` as a composition of torch's own operators: for compilers, which fuse it, and for torch.func."""
    weight, dtype = call.weight, call.branch_dtype
    check_factors(weight, A, B)
    x = as_dtype(x, call.dtype)
    W = call.dense()
    v = F.linear(x, W)
    a, b = as_dtype(A, dtype), as_dtype(B, dtype)
    low_rank = F.linear(F.linear(as_dtype(x, dtype), a), b)
    if lora_bias is not None:
        low_rank = low_rank + as_dtype(lora_bias, dtype)
    v = v + call.scaling * low_rank
    bias = weight.bias
    if magnitude is not None:
        gain = gain_of(magnitude, _composed_norm(call, W, a.detach(), b.detach()))
        v = gain * v
    if bias is not None:
        v = v + as_dtype(bias, v.dtype)
    return as_dtype(v, call.dtype)


def _composed_norm(call: Call, W: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        from . import ops

        return ops.row_norm(W, a, b, call.scaling, call.triton)
    return row_norm_torch(call.weight, a, b, call.scaling)
