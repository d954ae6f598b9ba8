# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing what a start needs: the base weight as one matrix, and the two factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peft.utils.other import infer_device

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


def read_matrix(layer: LoraLayer) -> torch.Tensor:
    """The base weight `[out, in]`, dequantised, in float32 (float64 if it is stored so); do not write to it."""
    weight = layer.norm_weight()
    matrix = weight.dense(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if layer.ephemeral_gpu_offload and matrix.device.type == "cpu":
        return matrix.to(infer_device())
    return matrix


def write_matrix(layer: LoraLayer, matrix: torch.Tensor) -> None:
    """Make `matrix` `[out, in]` the base weight, rounded or requantised to the format in which it is stored."""
    weight = layer.norm_weight()
    weight.write(matrix.to(weight.device))
    layer._replan()


def set_factors(layer: LoraLayer, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Make A `[k, in]` and B `[out, k]` an adapter's factors; on the meta device they are left to be loaded.

    Where k is less than the adapter's rank, because the base weight has no more directions, the further rows of A keep
    the values they were created with and the further columns of B are zero, so that they can still be trained.
    """
    lora_a, lora_b = layer.factors(name)
    if lora_a.is_meta:
        return
    k = a.shape[0]
    lora_a.data[:k].copy_(a)
    lora_b.data[:, :k].copy_(b)
    lora_b.data[:, k:].zero_()


def take_out(layer: LoraLayer, name: str, matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Start with A `[k, in]` and B `[out, k]`, and take `scaling · B A` out of the base weight `matrix` `[out, in]`.

    The factors are rounded first as they will be when the adapter takes the base weight's dtype, so that base and
    adapter together are the old weight as closely as its dtype allows.
    """
    dtype = layer.norm_weight().dtype
    a, b = a.to(dtype), b.to(dtype)
    set_factors(layer, name, a, b)
    write_matrix(layer, matrix - layer.scaling[name] * (b.to(matrix) @ a.to(matrix)))
