# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on HQQ's linear layers: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.weights import is_a

from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from .config import LoraConfig


class HqqLoraLinear(LoraLinearBase):
    """LoRA on an `HQQLinear` (1 to 8 bits)."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_hqq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `HqqLoraLinear` around HQQ's linear layer; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_a(base, "hqq.core.quantize.HQQLinear"):
        return None
    return HqqLoraLinear(target, adapter_name, config=config, **kwargs)
