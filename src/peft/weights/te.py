# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights of Transformer Engine's linear layer: plain ones, which it rounds to float8 where a recipe says so, and ones
that are kept in float8 (`fp8_model_init`)."""

from __future__ import annotations

import torch
from torch import nn

from .base import writing
from .formats import Format, register
from .stored import MaybePlainWeight

_PARTS = ("_data", "_scale_inv", "_rowwise_data", "_rowwise_scale_inv")


class TeWeight(MaybePlainWeight):
    """The weight of a `transformer_engine.pytorch.Linear`.

    A float8 weight is one of the library's tensor classes: it is read by its `dequantize` and written by `copy_`, which
    rounds to its scale. The classes cannot be cut, so their rows are cut out of the whole matrix.
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
        return self.layer.weight.detach().dequantize()[a:b]

    def _write(self, matrix: torch.Tensor) -> None:
        weight = self.layer.weight
        with writing(weight):
            weight.copy_(matrix.to(weight.device, weight.dtype))

    def _snapshot(self) -> tuple[torch.Tensor]:
        return (self.layer.weight.detach().clone(),)

    def _restore(self, snapshot: tuple[torch.Tensor]) -> None:
        weight = self.layer.weight
        with writing(weight):
            for name in self._parts():
                getattr(weight, name).copy_(getattr(snapshot[0], name))

    def tensors(self) -> dict[str, torch.Tensor]:
        weight = self.layer.weight
        return {"weight": weight, **{name: getattr(weight, name) for name in self._parts()}}

    def direct(self) -> bool:
        """Never: whether the product is in float8 is decided at each call."""
        return False

    def _parts(self) -> list[str]:
        """The names of the tensors that a float8 weight is made of."""
        held = {name: getattr(self.layer.weight, name, None) for name in _PARTS}
        return [name for name, part in held.items() if isinstance(part, torch.Tensor)]


register(
    Format(
        "Transformer Engine",
        TeWeight,
        ("transformer_engine.pytorch.module.linear.Linear",),
        remark="a float8 weight is made dense as a whole; a plain one is read by rows",
    )
)
