# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The maths of LoRA (Hu et al., arXiv 2106.09685): y + s·B A x, on any layer that can say what B A x is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft.engine.method import Additive

if TYPE_CHECKING:
    from .layer.base import LoraLayer


class LoraMethod(Additive):
    """Adds `scaling · B A x` to the output; folded, `scaling · B A` to the weight and `scaling · bias` to the bias."""

    def why_not_foldable(self, layer: LoraLayer, name: str) -> str | None:
        return why_no_bias_fold(layer, name)

    def apply(self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return y + layer.low_rank(name, x, y) * layer.scaling[name]

    def delta(self, layer: LoraLayer, name: str) -> torch.Tensor:
        return layer.fold_delta(name)

    def bias_delta(self, layer: LoraLayer, name: str) -> torch.Tensor | None:
        bias = layer.low_rank_bias(name)
        return None if bias is None else layer.scaling[name] * bias


def why_no_bias_fold(layer: LoraLayer, name: str) -> str | None:
    """Why an adapter with `lora_bias` cannot be folded into this layer, or None where it can."""
    if layer.low_rank_bias(name) is not None and layer._base_bias() is None:
        return "it was made with lora_bias=True and the base layer has no bias to add it to."
    return None


LORA = LoraMethod()
