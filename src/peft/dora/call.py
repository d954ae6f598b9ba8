# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What the passes over one layer have in common, worked out once: dtypes, how W is read, and which launches are made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import eager
from .factors import Factors, NormCache, plain_factors
from .norm import check_factors, runs_triton
from .products import as_dtype, autocast_dtype, product_in, scaled_product
from .route import Route, kernels

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
    mode = x.dtype, A.dtype, B.dtype, autocast, scaling, kind, A.device, B.device, A.size(0)
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
        mode: The dtypes of x, A and B, autocast's or None, the scaling, the type of x's device, the devices of A and B,
            and r.
        x: An input.
        weight, cache, route: As in `linear`.
    """

    __slots__ = (
        "autocast", "beside", "branch_dtype", "cache", "dtype", "in_features", "is_plain", "launches", "mode", "most_whole",
        "packed", "parts", "route", "scaling", "triton", "weight",
    )  # fmt: skip

    def __init__(
        self, mode: tuple, x: torch.Tensor, weight: Any, cache: NormCache | None, route: Route | None
    ) -> None:
        x_dtype, a_dtype, b_dtype, autocast, scaling, _, a_device, b_device, rank = mode
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
        self.most_whole: int | None = None  # tokens up to which a pass is made of whole launches
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

    def use(self, packed: Any) -> None:
        """Take note of the weight's bytes, None where it is dense, and of how they are read."""
        if packed is self.packed:
            return
        self.packed, self.parts, self.beside = packed, WHOLE, False
        if packed is not None and self.triton:
            self.parts = kernels().row_parts(packed, self.dtype) or WHOLE
            self.beside = kernels().goes_beside(packed, self.dtype, self.branch_dtype, self.mode[-1])

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

    def whole_weight(self, x: torch.Tensor) -> torch.Tensor | None:
        """W where the pass over x `[..., features]` is made of whole launches (`kernels/whole.py`), else None."""
        most = self.most_whole
        if most is None:
            most = self.most_whole = self._most_whole(x.device)
        if not 0 < x.numel() <= most * x.shape[-1] or self.parts is not WHOLE:
            return None
        W = self.dense()
        return W if W.stride(1) == 1 and W.dtype == self.dtype else None

    def _most_whole(self, device: torch.device) -> int:
        if not self.triton or self.dtype != self.branch_dtype:
            return 0
        return kernels().most_whole(device, self.dtype, self.weight.shape, self.mode[-1], self.scaling)

    def input_gradients(
        self,
        t: torch.Tensor,
        factors: Factors,
        x: torch.Tensor | None,
        need_x: bool,
        a_dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dx = t W + dh A, if needed, and with x dA = dhᵀ x `[r, in]` in its dtype, from t `[tokens, out]`; dh = s·t B."""
        W = self.whole_weight(t) if need_x else None
        if W is not None:
            return kernels().whole_bwd(t, W, x, factors.a, factors.b, self.scaling, a_dtype, self.launches)
        dh = scaled_product(t, factors.b, self.scaling)
        dx = da = None
        if need_x:
            dx, da = self.product_gradients(t, dh, factors.a, x, a_dtype)
        if x is not None and da is None:
            da = product_in(dh.t(), as_dtype(x, dh.dtype).view(-1, self.in_features), a_dtype)
        return dx, da

    def product_gradients(
        self, t: torch.Tensor, dh: torch.Tensor, a: torch.Tensor, x: torch.Tensor | None, a_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dx = t W + dh A `[tokens, in]`, and dA where it is made beside W."""
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
        self.use(factors.packed)
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        stats = factors.stats
        small = None if record else self.small_weight(x)
        if small is not None:
            return self.run_small(x, small, factors, lora_bias, bias), x, None, None, factors
        W = self.whole_weight(x)
        if W is not None:
            y, h, v = kernels().whole_fwd(
                x,
                W,
                factors.a,
                factors.b,
                stats=stats,
                bias=bias,
                lora_bias=lora_bias,
                scaling=self.scaling,
                keep_v=record and keep == "v",
                launches=self.launches,
            )
            return y, x, h, v, factors
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
