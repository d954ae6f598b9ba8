# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers that are built by hand: transformers' float8 ones, filled, and stand-ins with the names, attributes and tensor
layouts of EETQ and gptqmodel's GPU backends, none of which runs on a CPU."""

from __future__ import annotations

import torch
from torch import nn
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
        codes, y = weight.flatten().flip(0).view_as(weight), x.new_empty(*x.shape[:-1], weight.shape[1])
        for a in range(0, weight.shape[1], 16):  # a tile at a time becomes float16, as in the kernel
            y[..., a : a + 16] = x @ (codes[:, a : a + 16].half() * scales[a : a + 16])
        return y


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
