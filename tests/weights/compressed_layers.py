# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers that compressed-tensors makes. It is imported with this module."""

from __future__ import annotations

import math

import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import nn


def by_preset(name):
    return preset_name_to_scheme(name, ["Linear"])


def calibrate(layer):
    """Set the scales of a layer from its weight, as an observer of the library's users does."""
    args, weight = layer.quantization_scheme.weights, layer.weight.detach()
    out, features = weight.shape
    height, width = {
        "tensor": (out, features),
        "channel": (1, features),
        "block": tuple(args.block_structure or ()),
    }.get(args.strategy, (1, args.group_size))
    rows, columns = math.ceil(out / height), math.ceil(features / width)
    low, high = torch.zeros(rows, columns), torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            low[i, j], high[i, j] = block.min(), block.max()
    overall = None
    if hasattr(layer, "weight_global_scale"):
        overall = generate_gparam(low.min(), high.max())
        layer.weight_global_scale.data.copy_(overall)
    found = calculate_qparams(low.to(weight.dtype), high.to(weight.dtype), args, global_scale=overall)
    for name, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
        if hasattr(layer, name):
            held = getattr(layer, name)
            held.data.copy_(value.reshape(held.shape))
    if hasattr(layer, "input_scale"):
        layer.input_scale.data.fill_(0.02)


def quantised(model, scheme, mode):
    """A model whose linear layers are in a scheme: "compressed", unpacked again ("plain"), or "rounded" in each pass."""
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            calibrate(layer)
            if mode != "rounded":
                compress_module(layer)
            if mode == "plain":
                decompress_module(layer)
    return model.requires_grad_(False)
