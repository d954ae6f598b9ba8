# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that gptqmodel's layers rearrange for a kernel of theirs (Marlin, Machete, ExLlama, BitBLAS and others): known
by what the layer computes alone."""

from __future__ import annotations

from typing import NoReturn

import torch

from .formats import Format, register
from .stored import StoredWeight
from .through import read_through

# Parts of the names of layers that round their input, so that products with unit vectors do not tell the weight.
_ROUND_THE_INPUT = ("Int8", "QQQ", "W4A", "NVFP4")


class ClosedWeight(StoredWeight):
    """The weight of a linear layer of gptqmodel whose tensors are in no common layout.

    It is read by products of unit vectors, so a chunk of rows costs a whole product; it cannot be written.
    """

    format = "gptqmodel"

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        scales = getattr(self.layer, "scales", None)
        halves = torch.float16, torch.bfloat16
        return scales.dtype if isinstance(scales, torch.Tensor) and scales.dtype in halves else torch.float16

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def trainable(self) -> bool:
        return False

    @property
    def differentiable(self) -> bool:
        """Whether gradients get through the layer to its input, as gptqmodel declares it."""
        return bool(getattr(self.layer, "SUPPORTS_TRAINING", False))

    def _read(self, a: int, b: int) -> torch.Tensor:
        kind = type(self.layer).__name__
        if any(part in base.__name__ for base in type(self.layer).__mro__ for part in _ROUND_THE_INPUT):
            raise TypeError(
                f"the weight of a {kind} cannot be read, since the layer rounds its input: load the model with another "
                'backend, such as GPTQConfig(backend="gptq_torch")'
            )
        return read_through(self._product, self.shape, (a, b), self.dtype, self.device)

    @torch.no_grad()
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ; the bias is taken off meanwhile, since a sum with it would be rounded."""
        layer, bias = self.layer, self.bias
        if bias is None:
            return layer(x)
        layer.bias = None
        try:
            return layer(x)
        finally:
            layer.bias = bias

    def why_read_only(self) -> str:
        return (
            f"a {type(self.layer).__name__} keeps its weight rearranged for its kernel, which cannot be written. Load the "
            'model with a backend that keeps the common layout, such as GPTQConfig(backend="gptq_torch"), to merge.'
        )

    def write(self, matrix: torch.Tensor) -> NoReturn:
        raise TypeError(self.why_read_only())

    def snapshot(self) -> NoReturn:
        raise TypeError(self.why_read_only())

    def restore(self, snapshot: object) -> NoReturn:
        raise TypeError(self.why_read_only())

    def tensors(self) -> dict[str, torch.Tensor]:
        layer = self.layer
        held = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        return {name: tensor for name, tensor in held.items() if name != "bias"}


register(
    Format(
        "gptqmodel's other backends",
        ClosedWeight,
        (
            "gptqmodel.nn_modules.qlinear.paroquant.ParoLinear",  # rotates its input, unlike the layer it derives from
            "gptqmodel.nn_modules.qlinear.BaseQuantLinear",
        ),
        remark="Marlin, Machete, ExLlama and others, in a layout of their own: read through their product",
    )
)
