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
from .factors import Factors, NormCache, plain_factors
from .norm import check_factors, row_norm_torch, runs_triton
from .products import as_dtype, autocast_dtype, product_in, scaled_product, sum_dtype
from .reference import gain as gain_of
from .route import Route, kernels


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
WHOLE: list[tuple[int, int] | None] = [None]


def find_call(
    x: torch.Tensor,
    weight: Any,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    cache: NormCache | None,
    route: Route | None,
) -> Call:
    """The `Call` for these arguments: the cache's last one while it fits."""
    kind = "cuda" if x.is_cuda else x.device.type
    autocast = autocast_dtype(kind)
    mode = x.dtype, A.dtype, B.dtype, autocast, scaling, kind, A.device, B.device
    call = None if cache is None else cache.call
    if call is None or call.mode != mode or call.weight is not weight or call.route is not route:
        call = Call(mode, x, weight, cache, route)
        if cache is not None:
            cache.call = call
    if not x.dim() or x.shape[-1] != call.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected [..., {weight.shape[1]}], the weight's input features"
        )
    return call


class Call:
    """What passes with inputs of one kind have in common, worked out once.

    Args:
        mode: The dtypes of x, A and B, autocast's or None, the scaling, the type of x's device, the devices of A and B.
        x: An input.
        weight, cache, route: As in `linear`.
    """

    __slots__ = (
        "autocast", "beside", "branch_dtype", "cache", "dtype", "in_features", "is_plain", "launches", "mode", "packed",
        "parts", "route", "scaling", "triton", "weight",
    )  # fmt: skip

    def __init__(
        self, mode: tuple, x: torch.Tensor, weight: Any, cache: NormCache | None, route: Route | None
    ) -> None:
        x_dtype, a_dtype, b_dtype, autocast, scaling, _, a_device, b_device = mode
        if not x.device == a_device == b_device:  # products of a CPU's tensors with meta ones give rubbish, no error
            raise RuntimeError(f"expected x, A and B on one device, got {x.device}, {a_device} and {b_device}")
        self.mode = mode
        self.autocast = x_dtype != torch.float64 and autocast is not None
        self.dtype = autocast if self.autocast else x_dtype
        if self.autocast or a_dtype == b_dtype == x_dtype:
            self.branch_dtype = self.dtype
        else:
            self.branch_dtype = torch.promote_types(x_dtype, torch.promote_types(a_dtype, b_dtype))
        self.weight = weight
        self.in_features = weight.shape[1]
        # Outside autocast a plain weight of another dtype than x is refused by the product, as by the layer itself.
        self.is_plain = weight.format == "plain"
        self.scaling = scaling
        self.cache = cache
        self.route = route
        self.packed = None
        self.parts = WHOLE  # ranges of rows in which a large packed W is unpacked, one after the other
        self.beside = False  # whether h and dA are computed where W is unpacked
        self.triton = runs_triton(route, x, self.branch_dtype)
        self.launches: dict = {}

    def factors(self, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor | None, floor: bool) -> Factors:
        cache = self.cache
        if cache is None:
            if magnitude is None:
                check_factors(self.weight, A, B)
                return plain_factors(A, B, self.branch_dtype)
            cache = NormCache()
        return cache.factors(
            self.weight,
            A,
            B,
            self.scaling,
            self.branch_dtype,
            triton=self.triton,
            magnitude=magnitude,
            floor=floor,
            norm=magnitude is not None,
        )

    def dense(self, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """W `[out, in]`, or some rows of a packed one, in the dtype of the base product."""
        if self.packed is not None and self.triton:
            return kernels().dequantise(self.packed, self.dtype, self.launches, rows)
        return self.weight.dense() if self.is_plain and not self.autocast else self.weight.dense(self.dtype)

    def use(self, packed: Any, rank: int) -> None:
        """Take note of the weight's bytes, None where it is dense, and of how they are read."""
        if packed is self.packed:
            return
        self.packed, self.parts, self.beside = packed, WHOLE, False
        if packed is not None and self.triton:
            self.parts = kernels().row_parts(packed, self.dtype) or WHOLE
            self.beside = kernels().goes_beside(packed, self.dtype, self.branch_dtype, rank)

    def unpack(
        self,
        rows: tuple[int, int] | None,
        x: torch.Tensor | None,
        thin: torch.Tensor | None,
        product_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`dense(rows)` and the product of x and `thin` that its launch makes too (see `unpack_beside`), None without."""
        if x is None or thin is None or not self.beside:
            return self.dense(rows), None
        return kernels().unpack_beside(self.packed, x, thin, product_dtype, self.launches, rows)

    def products(
        self, x: torch.Tensor, a: torch.Tensor | None, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x Wᵀ + bias `[..., out]` and h = x Aᵀ `[..., r]`, None without A."""
        h = None
        if self.parts is WHOLE:
            W, h = self.unpack(None, x, a)
            u = F.linear(x, W, bias)
        else:
            u = x.new_empty((*x.shape[:-1], self.weight.shape[0]))
            rows, columns = x.view(-1, x.shape[-1]), u.view(-1, u.shape[-1])
            for part in self.parts:
                W, h = self.unpack(part, x, a) if h is None else (self.dense(part), h)
                torch.mm(rows, W.t(), out=columns[:, part[0] : part[1]])
                del W  # before there is the next one
            if bias is not None:
                u += bias
        if a is not None and h is None:
            h = F.linear(as_dtype(x, self.branch_dtype), a)
        return u, h

    def input_gradients(
        self, t: torch.Tensor, dh: torch.Tensor, a: torch.Tensor, x: torch.Tensor | None, a_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dx = t W + dh A `[tokens, in]` and, where x is given, dA = dhᵀ x `[r, in]` in its dtype."""
        t = as_dtype(t, self.dtype)
        alike = dh.dtype == self.dtype
        # cuBLAS reads what is there to be added behind the long sums: cheap, where dx is the larger part of it.
        first = alike and (self.parts is not WHOLE or self.in_features >= t.shape[1])
        dx = torch.mm(dh, a) if first else None
        da = None
        for part in self.parts:
            columns = t if part is None else t[:, part[0] : part[1]]
            W, da = self.unpack(part, x, dh, a_dtype) if da is None else (self.dense(part), da)
            dx = torch.mm(columns, W) if dx is None else dx.addmm_(columns, W)
            del W  # before there is the next one
        if not first:
            dx = dx.addmm_(dh, a) if alike else torch.addmm(dx.to(dh.dtype), dh, a)
        if x is not None and da is None:
            da = product_in(dh.t(), as_dtype(x, dh.dtype).view(-1, self.in_features), a_dtype)
        return dx, da

    def small_weight(self, x: torch.Tensor) -> tuple[torch.Tensor | None, Any] | None:
        """What the kernel reads that makes the whole output of x, W or its stored bytes; None where it does not."""
        tokens = x.numel() // self.in_features
        if not self.triton or tokens > kernels().MOST_TOKENS or (self.packed is None and not self.is_plain):
            return None
        W = None if self.packed is not None else self.weight.dense()
        return (W, self.packed) if kernels().is_small(W, self.packed, self.dtype, tokens) else None

    def run_small(
        self,
        x: torch.Tensor,
        weight: tuple[torch.Tensor | None, Any],
        factors: Factors,
        lora_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y `[..., out]` by the kernel that reads `small_weight(x)`, written to `out` where that is given."""
        return kernels().small_batch(
            x,
            *weight,
            factors.a,
            factors.b,
            stats=factors.stats,
            bias=bias,
            lora_bias=lora_bias,
            scaling=self.scaling,
            launches=self.launches,
            out=out,
        )

    @property
    def body(self) -> Any:
        """The module whose passes over the output run."""
        return kernels() if self.triton else eager

    def run(
        self,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        magnitude: torch.Tensor | None,
        lora_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
        keep: str | None,
        record: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Factors]:
        """The forward pass: y `[..., out]`, x and h in the dtypes of their products, v or None, and the factors.

        With `record` False only y and the factors are promised.
        """
        factors = self.factors(A, B, magnitude, floor=keep == "y")
        self.use(factors.packed, factors.a.shape[0])
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        stats = factors.stats
        small = None if record else self.small_weight(x)
        if small is not None:
            return self.run_small(x, small, factors, lora_bias, bias), x, None, None, factors
        with_bias = bias is not None and stats is None
        u, h = self.products(x, factors.a, as_dtype(bias.detach(), x.dtype) if with_bias else None)
        y, v = self.body.compose(
            u,
            h,
            factors.b,
            stats=stats,
            bias=None if stats is None else bias,
            lora_bias=lora_bias,
            scaling=self.scaling,
            keep_v=record and keep == "v",
            launches=self.launches,
        )
        return y, x, h, v, factors


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
    return None if dx is None else dx.view(ctx.like[0]), *rest, None


def _gradients(
    ctx: Any, factors: Factors, dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor, kept: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x `[tokens, in]`, A, B, the magnitude and both biases."""
    call: Call = ctx.call
    shape, x_dtype, a_dtype, b_dtype = ctx.like
    magnitude, lora_bias, bias = ctx.vectors
    need_x, need_a, need_b, need_m, need_c, need_bias = ctx.needs_input_grad[:6]
    kept_is_v = ctx.keep == "v"
    if need_m and not kept_is_v and kept._version:
        kept, kept_is_v = _recompute(call, x, h, factors, lora_bias), True
    call.use(factors.packed, factors.a.shape[0])
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
    da = dx = dc = None
    if need_b and db is None:
        db = product_in(t.t(), h.view(-1, h.shape[-1]), b_dtype, call.scaling)
    if need_a or need_x:
        dh = scaled_product(t, factors.b, call.scaling)
        if need_x:
            dx, da = call.input_gradients(t, dh, factors.a, x if need_a else None, a_dtype)
            dx = as_dtype(dx, x_dtype)
        elif need_a:
            da = product_in(dh.t(), as_dtype(x, dh.dtype).view(-1, call.in_features), a_dtype)
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
