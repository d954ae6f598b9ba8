# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that Intel Neural Compressor converted to float8."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .formats import Format, register
from .stored import MaybePlainWeight


class _Snapshot(NamedTuple):
    tensors: dict[str, torch.Tensor]
    number: float | None  # the scale where it is one


class IncWeight(MaybePlainWeight):
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
    def is_plain(self) -> bool:
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
    def _number(self) -> float | None:
        """The scale of a quantised weight where it is no tensor."""
        scale = None if self.is_plain else self._scale
        return None if isinstance(scale, torch.Tensor) else scale

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.layer.weight.shape
        return (first, second) if self.is_plain else (second, first)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype if self.is_plain else self.layer.hp_dtype

    @property
    def differentiable(self) -> bool:
        """The float8 product records no gradient."""
        return self.is_plain

    def _read(self, a: int, b: int) -> torch.Tensor:
        scale = self._scales()[:, None]
        block = self.layer.weight.detach()[:, a:b].T.float() * (scale if len(scale) == 1 else scale[a:b])
        return block.to(self.dtype)  # as the library rounds it

    def _write(self, matrix: torch.Tensor) -> None:
        """Scales stay as they are where the new rows fit under them, and grow by powers of two
        where they do not: float8 keeps its precision over a wide range."""
        wide, old = matrix.detach().to(self.device, torch.float32), self._scales()
        kind, limit = self.layer.weight.dtype, torch.finfo(self.layer.weight.dtype).max
        largest = wide.abs().amax(1) if len(old) > 1 else wide.abs().amax()[None]
        scale = old * torch.exp2(torch.ceil(torch.log2((largest / (limit * old)).clamp(min=1.0))))
        data = (wide / scale[:, None]).clamp_(-limit, limit).T.to(kind)
        held = self._scale
        if isinstance(held, torch.Tensor):
            self._put({"weight": data, "scale": scale.to(held.dtype).view(held.shape)})
        else:
            self._restore(_Snapshot({"weight": data}, float(scale)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weight, and the scale where it is no number."""
        held = {"weight": self.layer.weight}
        return held if self.is_plain or self._number is not None else {**held, "scale": self._scale}

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        if name == "weight":
            self.layer.weight.data = tensor
        else:
            setattr(self._home, self._scale_name, tensor)

    def _snapshot(self) -> _Snapshot:
        return _Snapshot(super()._snapshot(), self._number)

    def _restore(self, snapshot: _Snapshot) -> None:
        tensors, number = snapshot
        super()._restore(tensors)
        if number is not None:
            setattr(self._home, self._scale_name, number)

    def key(self) -> tuple:
        return self._number, *super().key()

    def has_key(self, key: tuple) -> bool:
        return key[0] == self._number and super().has_key(key[1:])

    def _scales(self) -> torch.Tensor:
        """[1] or [out], float32."""
        return torch.as_tensor(self._scale, device=self.device).detach().float().reshape(-1)


register(
    Format(
        "Intel Neural Compressor float8",
        IncWeight,
        ("neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear",),
        verified="CPU",
        remark="the mode with `use_qdq`; Gaudi's keeps the same tensors",
    )
)
