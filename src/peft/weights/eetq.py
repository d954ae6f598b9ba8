# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""EETQ's int8 weights, whose bytes are ordered as its GPU kernels want them: read through their product."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .formats import Format, register
from .stored import StoredWeight
from .through import read_through


class EetqWeight(StoredWeight):
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
    def differentiable(self) -> bool:
        """EETQ's own layer records nothing, and transformers' loses its way in batches of more than one."""
        return False

    def _read(self, a: int, b: int) -> torch.Tensor:
        weight, scales = (tensor.detach() for tensor in self.tensors().values())
        product = self._kernels.w8_a16_gemm
        return read_through(lambda unit: product(unit, weight, scales), self.shape, (a, b), self.dtype, self.device)

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`, by the library's own quantisation: symmetric, one scale a row."""
        self._check_matrix(matrix)
        data, scale = self._kernels.quant_weights(
            matrix.detach().to(self.dtype).T.contiguous().cpu(), torch.int8, False
        )  # fmt: skip
        self._put({"weight": data, "weight_scales": scale.to(self.dtype)})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.layer.weight, "weight_scales": self.layer.weight_scales}

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


register(
    Format(
        "EETQ",
        EetqWeight,
        ("transformers.integrations.eetq.EetqLinear", "eetq.modules.qlinear.EETQLinear"),
        remark="read through its product",
    )
)
