# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""EETQ's int8 weights, whose bytes are ordered as its GPU kernels want them: read through their product."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from .base import BaseWeight, overwrite, stamp
from .through import read_through


class _Stored(NamedTuple):
    data: torch.Tensor
    scale: torch.Tensor


class EetqWeight(BaseWeight):
    """The weight of an `EetqLinear`: int8 [in, out] in the kernels' own order, float16 scales [out].

    The product takes float16 and rounds no input, so that multiplying by unit vectors gives the very elements that it
    computes with.
    """

    format = "eetq"

    @property
    def shape(self) -> tuple[int, int]:
        features, out = self.layer.weight.shape
        return out, features

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight_scales.dtype

    @property
    def lossy(self) -> bool:
        return True

    @property
    def differentiable(self) -> bool:
        """EETQ's own layer records nothing, and transformers' loses its way in batches of more than one."""
        return False

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], dtype)

    @torch.no_grad()
    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        weight, scales, product = (
            self.layer.weight.detach(),
            self.layer.weight_scales.detach(),
            self._kernels.w8_a16_gemm,
        )
        block = read_through(
            lambda unit: product(unit, weight, scales), self.shape, (a, b), self.dtype, self.device
        )  # fmt: skip
        return block if dtype is None else block.to(dtype)

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`, by the library's own quantisation: symmetric, one scale a row."""
        self._check_matrix(matrix)
        data, scale = self._kernels.quant_weights(
            matrix.detach().to(self.dtype).T.contiguous().cpu(), torch.int8, False
        )  # fmt: skip
        self._put(_Stored(data.to(self.device), scale.to(self.device, self.dtype)))

    def snapshot(self) -> _Stored:
        return _Stored(self.layer.weight.detach().clone(), self.layer.weight_scales.detach().clone())

    def restore(self, snapshot: _Stored) -> None:
        self._put(_Stored(*(tensor.to(self.device) for tensor in snapshot)))

    def key(self) -> tuple:
        return (*stamp(self.layer.weight), *stamp(self.layer.weight_scales))

    def direct(self) -> bool:
        """Never: reading the weight costs a product of its own."""
        return False

    @property
    def _kernels(self) -> Any:
        """What has `w8_a16_gemm` and `quant_weights`: transformers keeps them in its module, EETQ in its extension."""
        home = next(
            sys.modules[kind.__module__]
            for kind in type(self.layer).__mro__
            if kind.__name__ in ("EetqLinear", "EETQLinear")
        )
        if hasattr(home, "w8_a16_gemm"):
            return home
        return home.eetq_kernels_hub

    def _put(self, new: _Stored) -> None:
        for old, tensor in zip((self.layer.weight, self.layer.weight_scales), new, strict=True):
            held = overwrite(old.detach(), tensor)
            if held.data_ptr() != old.data_ptr():
                old.data = held
