# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Stand-ins for Transformer Engine's linear layer and the tensor classes that its float8 weights are kept in, with their
names, attributes and tensor layouts: the library itself needs a GPU."""

from __future__ import annotations

import enum

import torch
from torch import nn
from torch.nn import functional as F

MOST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class DType(enum.Enum):
    kFloat8E4M3 = torch.float8_e4m3fn
    kFloat8E5M2 = torch.float8_e5m2


class QuantizedTensor(torch.Tensor):
    """Bytes and scales, and the dtype that it says it has. Written to, it is rounded anew; cut, it is made dense first."""

    parts: tuple[str, ...] = ()

    @staticmethod
    def __new__(cls, parts, dtype, fp8_dtype=DType.kFloat8E4M3):
        tensor = torch.Tensor._make_wrapper_subclass(cls, parts[0].shape, dtype=dtype)
        tensor._fp8_dtype = fp8_dtype
        for name, part in zip(cls.parts, parts, strict=True):
            setattr(tensor, name, part)
        return tensor

    def __init__(self, parts, dtype, fp8_dtype=DType.kFloat8E4M3):
        pass

    @classmethod
    def round(cls, matrix, dtype, fp8_dtype=DType.kFloat8E4M3):
        return cls(cls.rounded(matrix.float(), fp8_dtype.value), dtype, fp8_dtype)

    def __tensor_flatten__(self):
        return list(self.parts), {}

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        this = args[0]
        held = [getattr(this, name) for name in cls.parts] if isinstance(this, cls) else []
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(held, this.dtype, this._fp8_dtype)
        if func is torch.ops.aten.copy_.default:
            for part, new in zip(held, cls.rounded(args[1].float(), this._fp8_dtype.value), strict=True):
                part.copy_(new)
            return this
        return func(*(arg.dequantize() if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


def codes(matrix, scale, kind):
    return (matrix / scale).to(kind).view(torch.uint8)


class Float8Tensor(QuantizedTensor):
    """One reciprocal scale."""

    parts = ("_data", "_scale_inv")
    _transpose_invalid = False

    def _reset_caches(self):
        self._transpose_invalid = True

    @staticmethod
    def rounded(matrix, kind):
        scale = matrix.abs().max().reshape(1) / MOST[kind]
        return codes(matrix, scale, kind), scale

    def dequantize(self):
        return (self._data.view(self._fp8_dtype.value).float() * self._scale_inv).to(self.dtype)


class MXFP8Tensor(QuantizedTensor):
    """A power of two for every 32 elements of a row, and once more for every 32 of a column, with bytes of their own. The
    rows of scales are filled up to a multiple of 128, their columns to one of 4."""

    parts = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
    _with_gemm_swizzled_scales = False

    @classmethod
    def rounded(cls, matrix, kind):
        return (*cls.by_rows(matrix, kind), *(part.T.contiguous() for part in cls.by_rows(matrix.T, kind)))

    @staticmethod
    def by_rows(matrix, kind):
        exponent = torch.ceil(torch.log2(matrix.unflatten(1, (-1, 32)).abs().amax(2) / MOST[kind]))
        data = codes(matrix, torch.exp2(exponent).repeat_interleave(32, 1), kind)
        room = (0, -exponent.shape[1] % 4, 0, -exponent.shape[0] % 128)
        return data, F.pad((exponent + 127).to(torch.uint8), room, value=0xFF)

    def dequantize(self):
        out, features = self.shape
        power = self._rowwise_scale_inv[:out, : features // 32].float() - 127
        data = self._rowwise_data.view(self._fp8_dtype.value).float()
        return (data * torch.exp2(power).repeat_interleave(32, 1)).to(self.dtype)


class Float8BlockwiseQTensor(QuantizedTensor):
    """A float32 for every square of 128 x 128, the columns of scales filled up to a multiple of 4."""

    parts = ("_rowwise_data", "_rowwise_scale_inv")
    _is_2D_scaled = True

    @staticmethod
    def rounded(matrix, kind):
        out, features = matrix.shape
        padded = F.pad(matrix, (0, -features % 128, 0, -out % 128))
        scale = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / MOST[kind]
        each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :features]
        return codes(matrix, each, kind), F.pad(scale, (0, -scale.shape[1] % 4), value=float("nan"))

    def dequantize(self):
        out, features = self.shape
        each = self._rowwise_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :features]
        return (self._rowwise_data.view(self._fp8_dtype.value).float() * each).to(self.dtype)


class Float8LinewiseQTensor(Float8BlockwiseQTensor):
    """A `Float8BlockwiseQTensor` with a float32 for every 128 elements of a row, in columns filled up to a multiple of 4."""

    _is_2D_scaled = False

    @staticmethod
    def rounded(matrix, kind):
        features = matrix.shape[1]
        scale = F.pad(matrix, (0, -features % 128)).unflatten(1, (-1, 128)).abs().amax(2) / MOST[kind]
        data = codes(matrix, scale.repeat_interleave(128, 1)[:, :features], kind)
        return data, F.pad(scale.T.contiguous(), (0, -len(matrix) % 4), value=float("nan"))

    def dequantize(self):
        out, features = self.shape
        each = self._rowwise_scale_inv[:, :out].T.repeat_interleave(128, 1)[:, :features]
        return (self._rowwise_data.view(self._fp8_dtype.value).float() * each).to(self.dtype)


KINDS = {
    "float8": Float8Tensor,
    "mxfp8": MXFP8Tensor,
    "float8 by block": Float8BlockwiseQTensor,
    "float8 by line": Float8LinewiseQTensor,
}


class TeLinear(nn.Module):
    """Transformer Engine's linear layer: an empty bias where it has none, and further arguments of its forward."""

    def __init__(self, features, out, bias, kept_in, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features, self.use_bias = features, out, bias
        matrix = (torch.randn(out, features) / 8).to(dtype)
        self.weight = nn.Parameter(matrix if kept_in is None else kept_in.round(matrix, dtype))
        self.bias = nn.Parameter(torch.randn(out, dtype=dtype)) if bias else torch.Tensor().to(dtype)

    def forward(self, x, is_first_microbatch=None, fp8_output=False):
        matrix = self.weight.dequantize() if isinstance(self.weight, QuantizedTensor) else self.weight
        return F.linear(x, matrix, self.bias if self.use_bias else None)


TeLinear.__module__, TeLinear.__qualname__ = "transformer_engine.pytorch.module.linear", "Linear"


def te_linear(te, out, features, seed=0):
    """A layer told by a word: "plain" or one of `KINDS`, and "without bias" behind it."""
    torch.manual_seed(seed)
    kept_in = KINDS.get(te.removesuffix(" without bias"))
    return TeLinear(features, out, "without" not in te, kept_in).requires_grad_(False)
