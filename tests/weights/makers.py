# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers that are built by hand: transformers' float8 ones, filled, and stand-ins with the names, attributes and tensor
layouts of EETQ, Transformer Engine and gptqmodel's GPU backends, none of which runs on a CPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import compressed_tensors as by_row
from transformers.integrations import eetq as transformers_eetq
from transformers.integrations import fbgemm_fp8
from transformers.integrations import finegrained_fp8 as by_block


# ---- transformers' float8 --------------------------------------------------------------------------------------------
def _round_rows(x):
    data, scale = by_row.quantize_fp8_per_row(x.reshape(-1, x.shape[-1]))
    return (data.float() * scale[:, None]).view(x.shape)


def pytorch_body(x, weight, scale, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
    """What `fp8_linear` computes, in PyTorch: activations rounded to float8 by row, a float32 product."""
    dense = by_block._dequantize_fp8_weight(weight, scale, block_size, torch.float32)
    y = _round_rows(x.float()) @ dense.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def fbgemm_body(layer, x):
    """What `FbgemmFp8Linear` computes, in PyTorch."""
    y = _round_rows(x.float()) @ (layer.weight.float() * layer.weight_scale).T
    return (y if layer.bias is None else y + layer.bias).to(x.dtype)


def blocked(block=(32, 64), scale_fmt="float"):
    def make(out, features, matrix, bias):
        layer = by_block.FP8Linear(features, out, block, scale_fmt=scale_fmt, has_bias=True)
        fill(layer, matrix, bias)
        return layer

    return make


def rowwise(out, features, matrix, bias):
    layer = by_row.CompressedTensorsFP8Linear(features, out, has_bias=True)
    data, scale = by_row.quantize_fp8_per_row(matrix)
    layer.weight.data, layer.weight_scale.data, layer.bias.data = data, scale[None], bias
    return layer


def fbgemm(out, features, matrix, bias):
    layer = fbgemm_fp8.FbgemmFp8Linear(features, out, bias=True)
    data, scale = by_row.quantize_fp8_per_row(matrix)
    layer.weight.data, layer.weight_scale.data, layer.bias.data = data, scale[:, None], bias
    return layer


def fill(layer, matrix, bias):
    """Store a matrix in an `FP8Linear` block by block, each as transformers' quantisation of one block does."""
    height, width = layer.block_size or matrix.shape
    layer.bias.data = bias
    for i in range(0, matrix.shape[0], height):
        for j in range(0, matrix.shape[1], width):
            block = matrix[i : i + height, j : j + width]
            scale = (block.abs().max() / torch.finfo(torch.float8_e4m3fn).max).float()
            place = (i // height, j // width) if layer.block_size else ()
            layer.weight_scale_inv.data[place] = (
                torch.exp2(torch.ceil(torch.log2(scale))) if _is_ue8m0(layer) else scale
            )
            stored = layer.weight_scale_inv.data[place].float()
            layer.weight.data[i : i + height, j : j + width] = (block / stored).to(torch.float8_e4m3fn)


def _is_ue8m0(layer):
    return layer.weight_scale_inv.dtype == torch.float8_e8m0fnu


# ---- EETQ ------------------------------------------------------------------------------------------------------------
class Kernels:
    """EETQ's two functions on int8 [in, out], whose bytes stand in an order of the kernels' own: here reversed."""

    @staticmethod
    def quant_weights(weight, dtype, keep_unprocessed):
        assert weight.device.type == "cpu" and weight.is_contiguous() and dtype == torch.int8 and not keep_unprocessed
        scales = weight.float().abs().amax(0) / 127
        codes = (weight.float() / scales).round().to(torch.int8)
        return codes.flatten().flip(0).view_as(weight), scales.half()

    @staticmethod
    def w8_a16_gemm(x, weight, scales):
        assert x.dtype == scales.dtype == torch.float16 and weight.dtype == torch.int8
        matrix = weight.flatten().flip(0).view_as(weight).float() * scales.float()
        return (x.float() @ matrix).half()


class EETQLinear(nn.Module):
    """EETQ's own layer: buffers, and a product that records nothing."""

    def __init__(self, features, out):
        super().__init__()
        self.in_features, self.out_features = features, out
        self.register_buffer("weight", torch.zeros(features, out, dtype=torch.int8))
        self.register_buffer("weight_scales", torch.zeros(out, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out, dtype=torch.float16))

    @torch.no_grad()
    def forward(self, x):
        return Kernels.w8_a16_gemm(x, self.weight, self.weight_scales) + self.bias


EETQLinear.__module__, EETQLinear.__qualname__ = "eetq.modules.qlinear", "EETQLinear"


def eetq_linear(source, out, features, seed=0):
    torch.manual_seed(seed)
    matrix, bias = torch.randn(out, features).half() / 8, torch.randn(out).half()
    if source == "eetq":
        layer = EETQLinear(features, out)
    else:
        layer = transformers_eetq.EetqLinear(features, out, bias=True)
        layer.in_features, layer.out_features = features, out
    layer.weight.data, layer.weight_scales.data = Kernels.quant_weights(matrix.T.contiguous(), torch.int8, False)
    layer.bias.data = bias
    return layer.requires_grad_(False)


# ---- Transformer Engine ----------------------------------------------------------------------------------------------
class Float8Tensor(torch.Tensor):
    """A weight of Transformer Engine's: bytes, one reciprocal scale, and the dtype that it says it has."""

    @staticmethod
    def __new__(cls, data, scale_inv, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype)

    def __init__(self, data, scale_inv, dtype):
        self._data, self._scale_inv = data, scale_inv

    def dequantize(self, dtype=None):
        return (self._data.view(torch.float8_e4m3fn).float() * self._scale_inv).to(dtype or self.dtype)

    @classmethod
    def round(cls, matrix, dtype):
        scale = matrix.abs().max().float() / 448
        return cls((matrix.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale.reshape(1), dtype)

    def __tensor_flatten__(self):
        return ["_data", "_scale_inv"], {}

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        this = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(this._data, this._scale_inv, this.dtype)
        if func is torch.ops.aten.clone.default:
            return cls(this._data.clone(), this._scale_inv.clone(), this.dtype)
        if func is torch.ops.aten.copy_.default:
            fresh = cls.round(args[1], this.dtype)
            this._data.copy_(fresh._data), this._scale_inv.copy_(fresh._scale_inv)
            return this
        whole = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        return func(*whole, **(kwargs or {}))


class TeLinear(nn.Module):
    """Transformer Engine's linear layer: an empty bias where it has none, and further arguments of its forward."""

    def __init__(self, features, out, bias, kept_in_float8, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features, self.use_bias = features, out, bias
        matrix = (torch.randn(out, features) / 8).to(dtype)
        self.weight = nn.Parameter(Float8Tensor.round(matrix, dtype) if kept_in_float8 else matrix)
        self.bias = nn.Parameter(torch.randn(out, dtype=dtype)) if bias else torch.Tensor().to(dtype)

    def forward(self, x, is_first_microbatch=None, fp8_output=False):
        matrix = self.weight.dequantize() if isinstance(self.weight, Float8Tensor) else self.weight
        return F.linear(x, matrix, self.bias if self.use_bias else None)


TeLinear.__module__, TeLinear.__qualname__ = "transformer_engine.pytorch.module.linear", "Linear"


def te_linear(te, out, features, seed=0):
    torch.manual_seed(seed)
    return TeLinear(features, out, "without" not in te, "float8" in te).requires_grad_(False)


# ---- gptqmodel's other backends --------------------------------------------------------------------------------------
class BaseQuantLinear(nn.Module):
    SUPPORTS_TRAINING = True

    def __init__(self, out=12, features=8, bias=True):
        super().__init__()
        self.out_features, self.in_features = out, features
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("qweight", torch.randn(features, out, generator=generator).half().view(torch.int16))
        self.register_buffer("scales", torch.ones(1, dtype=torch.float16))
        self.register_buffer("bias", 100 * torch.randn(out, generator=generator).half() if bias else None)

    def forward(self, x):
        y = x @ self.qweight.view(torch.float16).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


BaseQuantLinear.__module__ = "gptqmodel.nn_modules.qlinear"


def named(name, **attributes):
    return type(name, (BaseQuantLinear,), {"__module__": "gptqmodel.nn_modules.qlinear.made_up", **attributes})
