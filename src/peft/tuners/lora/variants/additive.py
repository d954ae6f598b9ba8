# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What variants share whose adapter adds a matrix to the weight: they say which, the rest follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..layer.variant import LoraVariant
from ..method import LORA

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


class AdditiveVariant(LoraVariant):
    """A variant that adds `delta` to the base weight; as it stands, plain LoRA's."""

    @staticmethod
    def delta(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        """What the adapter adds to the weight, in the base layer's own orientation."""
        return module.low_rank_delta(active_adapter)

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing beyond A and B."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.fold_delta(active_adapter).to(orig_weight)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data.add_(module.fold_delta(active_adapter).to(orig_weight))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.fold_delta(active_adapter).to(orig_weight)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return LORA.apply(module, active_adapter, x, result)
