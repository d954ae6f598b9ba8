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

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)
        base = self.get_base_layer()
        if base.bias is not None and not base.bias.is_leaf:
            base.bias = base.bias.detach()  # HQQ leaves it to be trained along with the layer that it quantised

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_hqq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `HqqLoraLinear` around HQQ's linear layer; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_a(base, "hqq.core.quantize.HQQLinear"):
        return None
    return HqqLoraLinear(target, adapter_name, config=config, **kwargs)
