# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights of Transformer Engine's linear layer: plain ones, which it rounds to float8 where a recipe says so, and ones
that are kept in float8 (`fp8_model_init`)."""

from __future__ import annotations

import torch
from torch import nn

from .base import writing
from .formats import Format, register
from .stored import MaybePlainWeight, scale_columns

_KINDS = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}
_PARTS = (
    "_data", "_scale_inv", "_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv",
)  # fmt: skip
_BLOCK, _SMALL_BLOCK = 128, 32  # elements that share a scale: of a Float8BlockwiseQTensor, of an MXFP8Tensor


class TeWeight(MaybePlainWeight):
    """The weight of a `transformer_engine.pytorch.Linear`.

    A float8 weight is one of the library's tensor classes, whose bytes [out, in] are read with their scales: one
    (`Float8Tensor`), one for every 32 elements of a row (`MXFP8Tensor`, powers of two), or one for 128 elements of a row
    or a square of them (`Float8BlockwiseQTensor`). It is written by `copy_`, which rounds as the library does.
    """

    format = "transformer engine"

    @property
    def is_plain(self) -> bool:
        return type(self.layer.weight) in (nn.Parameter, torch.Tensor)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [out]; the library keeps an empty one where there is none."""
        bias = getattr(self.layer, "bias", None)
        return None if bias is None or bias.numel() == 0 else bias

    def _read(self, a: int, b: int) -> torch.Tensor:
        weight = self.layer.weight
        data = self._parts().get("_data", self._parts().get("_rowwise_data"))
        kind = _KINDS.get(getattr(getattr(weight, "_fp8_dtype", None), "name", ""))
        if data is None or kind is None or getattr(weight, "_with_gemm_swizzled_scales", False):
            raise TypeError(
                f"the rows of a {type(weight).__name__} cannot be read: Float8Tensor, MXFP8Tensor and "
                "Float8BlockwiseQTensor can, where they keep their bytes by rows and their scales in order. Build the model "
                "with another recipe, or outside of fp8_model_init"
            )
        block = data[a:b].view(kind).float()
        scale_columns(block, *self._scales(a, b))
        return block.to(self.dtype)

    def _scales(self, a: int, b: int) -> tuple[torch.Tensor, int]:
        """Those of rows a to b, [b − a, groups] or [1, 1], and how many columns share one."""
        parts, features = self._parts(), self.shape[1]
        if "_scale_inv" in parts:
            return parts["_scale_inv"].float().reshape(1, 1), features
        scale = parts["_rowwise_scale_inv"]  # what lies beyond the matrix fills up the kernels' tiles
        if scale.dtype == torch.uint8:
            return scale.view(torch.float8_e8m0fnu)[a:b].float(), _SMALL_BLOCK
        if not self.layer.weight._is_2D_scaled:
            return scale[:, a:b].T, _BLOCK
        first = a // _BLOCK
        return scale[first : -(-b // _BLOCK)].repeat_interleave(_BLOCK, 0)[a - first * _BLOCK :][: b - a], _BLOCK

    def _write(self, matrix: torch.Tensor) -> None:
        weight = self.layer.weight
        with writing(weight):
            weight.copy_(matrix.to(weight.device, weight.dtype))

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: part.detach().clone() for name, part in self._parts().items()}

    def _restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        weight = self.layer.weight
        with writing(weight):
            for name, part in snapshot.items():
                getattr(weight, name).copy_(part)
        if hasattr(weight, "_reset_caches"):  # a Float8Tensor keeps its transpose beside
            weight._reset_caches()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.layer.weight, **self._parts()}

    def _parts(self) -> dict[str, torch.Tensor]:
        """The tensors that a float8 weight is made of."""
        held = {name: getattr(self.layer.weight, name, None) for name in _PARTS}
        return {name: part for name, part in held.items() if isinstance(part, torch.Tensor)}


register(
    Format(
        "Transformer Engine",
        TeWeight,
        ("transformer_engine.pytorch.module.linear.Linear",),
        remark="float8 by tensor, by block and MXFP8; NVFP4 trains with LoRA alone and does not merge",
    )
)
