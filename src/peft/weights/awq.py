# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights in the GEMM layout of AWQ (Lin et al., arXiv 2306.00978), of gptqmodel's layers and of autoawq's."""

from __future__ import annotations

import torch

from .formats import Format, register
from .gptq import WordsWeight
from .words import BLOCK, pack, unpack_columns

# Of eight 4-bit integers, which one lies at each place of their word, and where each one lies.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


class AwqWeight(WordsWeight):
    """The weight of an AWQ layer: streams of 2 to 8 bits that run along the output features; of 4 bits, every eight in
    the order 0, 2, 4, 6, 1, 3, 5, 7."""

    format = "awq"
    kinds = frozenset(
        (
            ("gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchLinear"),
            ("gptqmodel.nn_modules.qlinear.gemm_awq", "AwqGEMMLinear"),
            ("gptqmodel.nn_modules.qlinear.gemm_awq_triton", "AwqGEMMTritonLinear"),
            ("awq.modules.linear.gemm", "WQLinear_GEMM"),
        )
    )

    @property
    def bits(self) -> int:
        return self.layer.w_bit if hasattr(self.layer, "w_bit") else self.layer.bits

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The scales' dtype: the layer computes in float16 or bfloat16, and casts its scales to what it is called with."""
        return self.layer.scales.dtype

    def _columns(self, words: torch.Tensor, a: int, b: int) -> torch.Tensor:
        out = self.shape[0]
        if self.bits != 4:
            return unpack_columns(words, self.bits, a, b, out)
        first, last = a // BLOCK * BLOCK, min(-(-b // BLOCK) * BLOCK, out)
        places = unpack_columns(words, 4, first, last, out).unflatten(1, (-1, 8))
        return places[..., PLACES].flatten(1)[:, a - first : b - first]

    def _codes(self, a: int, b: int) -> torch.Tensor:
        return self._columns(self.layer.qweight, a, b)

    def _zeros(self, a: int, b: int) -> torch.Tensor:
        return self._columns(self.layer.qzeros, a, b)

    def _pack(self, codes: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.layer.qweight.dtype
        if self.bits == 4:
            codes, zeros = (part.unflatten(1, (-1, 8))[..., ORDER].flatten(1) for part in (codes, zeros))
        return tuple(pack(part.T, self.bits, dtype).T for part in (codes, zeros))


register(
    Format(
        "AWQ",
        AwqWeight,
        tuple(sorted(".".join(kind) for kind in AwqWeight.kinds)),
        verified="CPU",
        remark="gptqmodel's, and autoawq's for GEMM",
    )
)
