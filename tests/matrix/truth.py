# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every row must give, in plain PyTorch and apart from the code under test: in float64, and in the row's precision.

The float64 result is the truth. The same formulas in the row's own precision, on top of the row's own base layer, say
which error is to be expected; a test allows twice that.

    LoRA   y = base(x) + s·B A x
    DoRA   y = g∘(W x + s·B A x) + b,   g = m / ‖W + s·B A‖, the norm taken by output feature and held constant
           with dropout d:  y = base(x) + (g − 1)∘W d(x) + g∘s·B A d(x)                       (arXiv 2402.09353)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from cases import Row


@dataclass
class Adapter:
    """The parameters of one adapter, as leaves.

    Args:
        a: `[r, in]`, of a convolution `[r, in, *kernel]`, of an embedding `[r, num_embeddings]`.
        b: `[out, r]`, of a convolution `[out, r / groups, 1, …]`.
        scaling: s.
        magnitude: m, in the layer's stored shape; None for LoRA.
        bias: Of B; None without `lora_bias`.
        mask: What dropout multiplies the input by; None without dropout.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Adapter:
        """A copy with leaves of its own, in another dtype."""
        return Adapter(**{f.name: _leaf(getattr(self, f.name), dtype) for f in fields(self)})

    def leaves(self) -> dict[str, torch.Tensor]:
        named = {"A": self.a, "B": self.b, "magnitude": self.magnitude, "lora_bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def _leaf(value: object, dtype: torch.dtype) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().to(dtype).requires_grad_(value.requires_grad)


def adapter_of(layer: nn.Module, name: str = "default", mask: torch.Tensor | None = None) -> Adapter:
    """An adapter's parameters, read from the public containers of a layer."""
    if name in layer.lora_embedding_A:
        a, b, bias = layer.lora_embedding_A[name], layer.lora_embedding_B[name], None
    else:
        a, b, bias = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_B[name].bias
    holder = layer.lora_magnitude_vector[name] if name in layer.lora_magnitude_vector else None
    return Adapter(a, b, layer.scaling[name], None if holder is None else holder.weight, bias, mask)


# ---- the base --------------------------------------------------------------------------------------------------------
def dense_base(base: nn.Module, row: Row) -> nn.Module:
    """The base layer in float64 with plain weights."""
    if row.form.quant is None:
        return copy.deepcopy(base).double()
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None).double()
    with torch.no_grad():
        plain.weight.copy_(dequantised(base, row))
        if base.bias is not None:
            plain.bias.copy_(base.bias)
    return plain.to(stored(base).device)


def stored(base: nn.Module) -> torch.Tensor:
    """The tensor that holds a base layer's weight, packed or not."""
    return next(getattr(base, name) for name in ("qweight", "W_q", "codes", "weight") if hasattr(base, name))


def dequantised(base: nn.Module, row: Row) -> torch.Tensor:
    """The dense weight `[out, in]` of a quantised layer, by its library alone."""
    return row.form.quantiser.dense(base).double()


def product(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The base layer's output without its bias."""
    bias = getattr(base, "bias", None)
    y = base(x)
    return y if bias is None else y - _over(bias, y, base)


def _over(vector: torch.Tensor, y: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """A vector `[out]` in a shape that multiplies or adds to an output."""
    dims = _conv_dims(base)
    return vector.reshape(-1, *[1] * dims) if dims else vector.reshape(-1)


def _conv_dims(base: nn.Module) -> int:
    return {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}.get(type(base), 0)


def _is_transposed(base: nn.Module) -> bool:
    return isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"


# ---- the adapter -----------------------------------------------------------------------------------------------------
def low_rank(base: nn.Module, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """B A x, and the bias of B."""
    if isinstance(base, nn.Embedding):
        return F.embedding(x, adapter.a.t(), base.padding_idx) @ adapter.b.t()
    x = x.to(adapter.a.dtype)
    if adapter.mask is not None:
        x = x * adapter.mask.to(x)
    if not _conv_dims(base):
        return F.linear(F.linear(x, adapter.a), adapter.b, adapter.bias)
    like = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    down = type(base)(base.in_channels, len(adapter.a), bias=False, device=x.device, dtype=x.dtype, **like)
    up = type(base)(len(adapter.a), base.out_channels, 1, groups=base.groups, device=x.device, dtype=x.dtype)
    bias = torch.zeros(base.out_channels).to(x) if adapter.bias is None else adapter.bias
    return functional_call(up, {"weight": adapter.b, "bias": bias}, functional_call(down, {"weight": adapter.a}, x))


def rows_of(weight: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """A stored weight as `[out, everything that an output feature sees]`."""
    if _is_transposed(base):
        return weight.t()
    groups = getattr(base, "groups", 1)
    if groups == 1:
        return weight.flatten(1)
    full = weight.new_zeros(base.out_channels, base.in_channels, *weight.shape[2:])
    out_size, in_size = base.out_channels // groups, base.in_channels // groups
    for group in range(groups):  # each group of output channels sees its own group of input channels
        rows = slice(group * out_size, (group + 1) * out_size)
        full[rows, group * in_size : (group + 1) * in_size] = weight[rows]
    return full.flatten(1)


def delta_rows(base: nn.Module, adapter: Adapter) -> torch.Tensor:
    """s·B A as `rows_of` orders it."""
    a, b = adapter.a.flatten(1), adapter.b.flatten(1)
    groups = getattr(base, "groups", 1)
    if groups > 1:
        b = torch.block_diag(*b.chunk(groups))
    return adapter.scaling * (b @ a)


def gain(base: nn.Module, weight: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """g `[out]`, of a dense stored weight; 1 for a row that is zero."""
    with torch.no_grad():
        norm = (rows_of(weight, base).to(adapter.a.dtype) + delta_rows(base, adapter)).norm(dim=1)
    magnitude = adapter.magnitude.flatten()
    return torch.where(norm == 0, torch.ones_like(magnitude), magnitude / torch.where(norm == 0, 1.0, norm))


def output(base: nn.Module, weight: torch.Tensor, adapters: list[Adapter], x: torch.Tensor) -> torch.Tensor:
    """The adapted output, in the dtype of the base layer's; several adapters act one after the other.

    Args:
        base: The base layer.
        weight: Its weight, dense, as it stores it.
        adapters: The active ones, in order.
        x: Input.
    """
    y = base(x)
    dtype = y.dtype
    for adapter in adapters:
        branch = adapter.scaling * low_rank(base, adapter, x)
        if adapter.magnitude is None:
            y = y + branch
            continue
        g = _over(gain(base, weight, adapter), y, base)
        if adapter.mask is None:
            bias = getattr(base, "bias", None)
            bias = torch.zeros(()).to(y) if bias is None else _over(bias, y, base)
            y = bias + g * (y - bias + branch)
        else:
            y = y + (g - 1) * product(base, x * adapter.mask.to(x)) + g * branch
    return y.to(dtype)


def merged_rows(base: nn.Module, weight: torch.Tensor, adapters: list[Adapter]) -> torch.Tensor:
    """What merging makes of a dense stored weight, as `rows_of` orders it, in the adapters' dtype."""
    rows = rows_of(weight, base).to(adapters[0].a.dtype)
    for adapter in adapters:
        rows = rows + delta_rows(base, adapter)
        if adapter.magnitude is not None:
            rows = gain(base, weight, adapter)[:, None] * rows
    return rows


# ---- errors ----------------------------------------------------------------------------------------------------------
def floor(dtype: torch.dtype, truth: torch.Tensor, ulps: float) -> float:
    """An error that rounding alone may make: some units in the last place of the largest entry."""
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return ulps * torch.finfo(dtype).eps * max(largest, torch.finfo(dtype).tiny)


def assert_as_good_as(
    ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str, *, ulps: float = 2.0
) -> None:
    """Our error against the truth is at most twice that of plain PyTorch in the same precision.

    Two bounds, each with a floor of `ulps` units in the last place of the largest entry, as on a handful of numbers
    plain PyTorch may happen to round to the truth itself: the root mean square, and the largest entry with twice the
    room, a maximum over few entries being a matter of luck.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    if not truth.numel():
        return
    dtype = ours.dtype
    ours_error, plain_error = (tensor.detach().double() - truth.detach() for tensor in (ours, plain))
    room = floor(dtype, truth.detach(), ulps)
    rms, plain_rms = (error.pow(2).mean().sqrt().item() for error in (ours_error, plain_error))
    assert rms <= 2 * plain_rms + room / 2, f"{what}: rms error {rms:.3e}, plain PyTorch's {plain_rms:.3e}"
    worst, plain_worst = (error.abs().max().item() for error in (ours_error, plain_error))
    assert worst <= 4 * plain_worst + room, f"{what}: largest error {worst:.3e}, plain PyTorch's {plain_worst:.3e}"
