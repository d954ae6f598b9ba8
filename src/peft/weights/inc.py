# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that Intel Neural Compressor converted to float8."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .base import BaseWeight, overwrite, stamp
from .plain import PlainWeight


class _Stored(NamedTuple):
    data: torch.Tensor
    scale: Any


class IncWeight(BaseWeight):
    """The weight of a `PatchedLinear`: float8 [in, out] times a scale, one number or one a row of the matrix, which the
    layer itself keeps (`scale_weight`) or its `dequant_weights` does (the mode with `use_qdq`, which also runs on CPUs).

    While the library calibrates a model (`prepare`), before it converts it, the weight is a plain one [out, in].

    Raises:
        TypeError: The layer was converted with `fake_quant`.
    """

    format = "inc"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if hasattr(layer, "qdq_weights"):
            raise TypeError(
                f"{type(layer).__name__} was converted with fake_quant=True, which rounds a plain weight in each forward "
                "pass and has no reader here: convert the model with use_qdq=True, or without either"
            )

    @property
    def _is_plain(self) -> bool:
        return not hasattr(self.layer, "dequant_weights") and not hasattr(self.layer, "scale_weight")

    @property
    def _home(self) -> nn.Module:
        """The module that keeps the scale."""
        return self.layer.dequant_weights if hasattr(self.layer, "dequant_weights") else self.layer

    @property
    def _scale_name(self) -> str:
        return "scale" if hasattr(self.layer, "dequant_weights") else "scale_weight"

    @property
    def _scale(self) -> Any:
        return getattr(self._home, self._scale_name)

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.layer.weight.shape
        return (first, second) if self._is_plain else (second, first)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype if self._is_plain else self.layer.hp_dtype

    @property
    def lossy(self) -> bool:
        return not self._is_plain

    @property
    def differentiable(self) -> bool:
        """The float8 product records no gradient."""
        return self._is_plain

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(0, self.shape[0], dtype)

    @torch.no_grad()
    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        if self._is_plain:
            return PlainWeight(self.layer).rows(a, b, dtype)
        scale = self._scales()[:, None]
        block = self.layer.weight.detach()[:, a:b].T.float() * (scale if len(scale) == 1 else scale[a:b])
        block = block.to(self.dtype)  # as the library rounds it
        return block if dtype is None else block.to(dtype)

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`. Scales stay as they are where the new rows fit under them, and grow by powers of two
        where they do not: float8 keeps its precision over a wide range."""
        self._check_matrix(matrix)
        if self._is_plain:
            PlainWeight(self.layer).write(matrix)
            return
        wide, old = matrix.detach().to(self.device, torch.float32), self._scales()
        kind, limit = self.layer.weight.dtype, torch.finfo(self.layer.weight.dtype).max
        largest = wide.abs().amax(1) if len(old) > 1 else wide.abs().amax()[None]
        scale = old * torch.exp2(torch.ceil(torch.log2((largest / (limit * old)).clamp(min=1.0))))
        data = (wide / scale[:, None]).clamp_(-limit, limit).T.to(kind)
        held = self._scale
        self._put(
            _Stored(data, scale.to(held.dtype).view(held.shape) if isinstance(held, torch.Tensor) else float(scale))
        )

    def snapshot(self) -> _Stored | torch.Tensor:
        if self._is_plain:
            return PlainWeight(self.layer).snapshot()
        scale = self._scale
        return _Stored(
            self.layer.weight.detach().clone(), scale.detach().clone() if isinstance(scale, torch.Tensor) else scale
        )

    def restore(self, snapshot: _Stored | torch.Tensor) -> None:
        if isinstance(snapshot, torch.Tensor):
            PlainWeight(self.layer).restore(snapshot)
            return
        data, scale = snapshot
        self._put(_Stored(data.to(self.device), scale.to(self.device) if isinstance(scale, torch.Tensor) else scale))

    def key(self) -> tuple:
        if self._is_plain:
            return stamp(self.layer.weight)
        scale = self._scale
        return (*stamp(self.layer.weight), stamp(scale) if isinstance(scale, torch.Tensor) else scale)

    def direct(self) -> bool:
        """Never: the layer rounds its input too."""
        return False

    def _scales(self) -> torch.Tensor:
        """[1] or [out], float32."""
        return torch.as_tensor(self._scale, device=self.device).detach().float().reshape(-1)

    def _put(self, new: _Stored) -> None:
        weight, scale = self.layer.weight, self._scale
        held = overwrite(weight.detach(), new.data)
        if held.data_ptr() != weight.data_ptr():
            weight.data = held
        if isinstance(scale, torch.Tensor):
            overwrite(scale.detach(), new.scale)
        else:
            setattr(self._home, self._scale_name, new.scale)
