# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights in one byte of float8 an element with float32 scales by block, by row or by tensor: transformers' `FP8Linear`
(DeepSeek-V3's checkpoints, arXiv 2412.19437), `CompressedTensorsFP8Linear` and `FbgemmFp8Linear`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .base import BaseWeight, overwrite, stamp
from .plain import PlainWeight


class _Stored(NamedTuple):
    data: torch.Tensor
    scale: torch.Tensor


class Float8Weight(BaseWeight):
    """A float8 weight [out, in] times its scales, read in float32: w = data · scale.

    `FP8Linear` keeps them as `weight_scale_inv`, [out / block, in / block] rounded up or one number, in float32 or as
    powers of two (UE8M0); the others as `weight_scale`, one number a row.

    Raises:
        TypeError: The layer keeps FP4 codes in its bytes.
    """

    format = "float8"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if not layer.weight.is_floating_point():
            raise TypeError(
                f"{type(layer).__name__} keeps its weight as FP4 codes in {layer.weight.dtype}, a format that has no reader "
                "here: load the model with its quantisation config's dequantize=True"
            )

    @property
    def _is_plain(self) -> bool:
        """A weight that was loaded dense: the layer then multiplies by it as `nn.Linear` does."""
        return self.layer.weight.element_size() > 1

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.layer.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype if self._is_plain else torch.float32

    @property
    def lossy(self) -> bool:
        return not self._is_plain

    @property
    def differentiable(self) -> bool:
        """The activations are rounded too, and what the layers' own functions give back leaves the bias out."""
        return self._is_plain

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], dtype)

    @torch.no_grad()
    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        if self._is_plain:
            return PlainWeight(self.layer).rows(a, b, dtype)
        block = self.layer.weight.detach()[a:b].float()
        height, width = self._block
        scale = self._scale.detach().float().reshape(self._grid)[a // height : -(-b // height)]
        scale = scale.repeat_interleave(height, 0)[a - a // height * height :][: b - a]
        whole = block.shape[1] // width * width
        block[:, :whole].unflatten(1, (-1, width)).mul_(scale[:, : whole // width, None])
        block[:, whole:].mul_(scale[:, whole // width :])
        return block if dtype is None else block.to(dtype)

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`; each block is scaled so that its largest magnitude is float8's."""
        self._check_matrix(matrix)
        if self._is_plain:
            PlainWeight(self.layer).write(matrix)
            return
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
        self._put(_Stored(data, scale.reshape(self._scale.shape).to(self._scale.dtype)))

    def snapshot(self) -> _Stored | torch.Tensor:
        if self._is_plain:
            return PlainWeight(self.layer).snapshot()
        return _Stored(self.layer.weight.detach().clone(), self._scale.detach().clone())

    def restore(self, snapshot: _Stored | torch.Tensor) -> None:
        if isinstance(snapshot, torch.Tensor):
            PlainWeight(self.layer).restore(snapshot)
        else:
            self._put(_Stored(*(tensor.to(self.device) for tensor in snapshot)))

    def key(self) -> tuple:
        return (*stamp(self.layer.weight), *stamp(self._scale))

    def direct(self) -> bool:
        """Never: the layers round their input too."""
        return False

    @property
    def _scale(self) -> torch.Tensor:
        layer = self.layer
        return layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale

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

    def _put(self, new: _Stored) -> None:
        for old, tensor in zip((self.layer.weight, self._scale), new, strict=True):
            held = overwrite(old.detach(), tensor)
            if held.data_ptr() != old.data_ptr():
                old.data = held
