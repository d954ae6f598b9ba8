# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights in one byte of float8 an element with float32 scales by block, by row or by tensor: transformers' `FP8Linear`
(DeepSeek-V3's checkpoints, arXiv 2412.19437), `CompressedTensorsFP8Linear` and `FbgemmFp8Linear`."""

from __future__ import annotations

import torch
from torch import nn

from .formats import Format, is_a, register
from .stored import MaybePlainWeight, scale_columns

_BY_BLOCK = "transformers.integrations.finegrained_fp8"


class Float8Weight(MaybePlainWeight):
    """A float8 weight [out, in] times its scales, read in float32: w = data · scale.

    `FP8Linear` keeps them as `weight_scale_inv`, [out / block, in / block] rounded up or one number, in float32 or as
    powers of two (UE8M0); the others as `weight_scale`, one number a row.

    Raises:
        TypeError: The layer keeps FP4 codes in its bytes, or a stack of matrices.
    """

    format = "float8"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if is_a(layer, f"{_BY_BLOCK}.FP8GroupedLinear"):
            raise TypeError(
                f"{type(layer).__name__}: a stack of matrices, one a group of the input, cannot be read as a matrix "
                "[out, in]"
            )
        if not layer.weight.is_floating_point():
            raise TypeError(
                f"{type(layer).__name__} keeps its weight as FP4 codes in {layer.weight.dtype}, a format that has no reader "
                "here: load the model with its quantisation config's dequantize=True"
            )

    @property
    def is_plain(self) -> bool:
        """A weight that was loaded dense: the layer then multiplies by it as `nn.Linear` does."""
        return self.layer.weight.element_size() > 1

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype if self.is_plain else torch.float32

    @property
    def differentiable(self) -> bool:
        """The activations are rounded too, and what the layers' own functions give back leaves the bias out."""
        return self.is_plain

    def _read(self, a: int, b: int) -> torch.Tensor:
        block = self.layer.weight.detach()[a:b].float()
        height, width = self._block
        scale = self._scale.detach().float().reshape(self._grid)[a // height : -(-b // height)]
        scale = scale.repeat_interleave(height, 0)[a - a // height * height :][: b - a]
        scale_columns(block, scale, width)
        return block

    def _write(self, matrix: torch.Tensor) -> None:
        """Each block is scaled so that its largest magnitude is float8's."""
        (out, features), (height, width), (rows, columns) = self.shape, self._block, self._grid
        kind, limit = self.layer.weight.dtype, torch.finfo(self.layer.weight.dtype).max
        wide = matrix.detach().to(self.device, torch.float32)
        padded = nn.functional.pad(wide, (0, columns * width - features, 0, rows * height - out))
        blocks = padded.view(rows, height, columns, width)
        largest = blocks.abs().amax((1, 3))
        scale = torch.where(largest > 0, largest / limit, 1.0)
        if self._scale.dtype.itemsize == 1:  # UE8M0: the power of two above
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        data = (blocks / scale[:, None, :, None]).clamp_(-limit, limit).view_as(padded)[:out, :features].to(kind)
        self._put(
            dict(zip(self.tensors(), (data, scale.reshape(self._scale.shape).to(self._scale.dtype)), strict=True))
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {"weight": self.layer.weight}
        return held if self.is_plain else {**held, self._scale_name: self._scale}

    @property
    def _scale_name(self) -> str:
        return "weight_scale_inv" if hasattr(self.layer, "weight_scale_inv") else "weight_scale"

    @property
    def _scale(self) -> torch.Tensor:
        return getattr(self.layer, self._scale_name)

    @property
    def _block(self) -> tuple[int, int]:
        """Height and width of what shares one scale."""
        out, features = self.shape
        size = self._scale.numel()
        if size == 1:
            return max(out, 1), max(features, 1)
        return (1, features) if size == out and not hasattr(self.layer, "block_size") else tuple(self.layer.block_size)

    @property
    def _grid(self) -> tuple[int, int]:
        """How many blocks there are, down and across."""
        (out, features), (height, width) = self.shape, self._block
        return -(-out // height), -(-features // width)


register(
    Format(
        "compressed-tensors float8 in transformers",
        Float8Weight,
        ("transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear",),
        verified="CPU",
    ),
    Format(
        "transformers' float8 (`FP8Linear`)",
        Float8Weight,
        (f"{_BY_BLOCK}.FP8Linear",),
        verified="CPU, but for the kernel",
        remark="scales by block or tensor, float32 or UE8M0",
    ),
    Format("FBGEMM float8 in transformers", Float8Weight, ("transformers.integrations.fbgemm_fp8.FbgemmFp8Linear",)),
)
