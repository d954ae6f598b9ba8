# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers that AQLM quantised: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.weights import is_a

from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from .config import LoraConfig


class AqlmLoraLinear(LoraLinearBase):
    """LoRA on `aqlm.QuantizedLinear` (arXiv 2401.06118). It can be trained and used, not merged."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_aqlm(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `AqlmLoraLinear` around a layer that AQLM quantised; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_a(base, "aqlm.inference.QuantizedLinear"):
        return None
    return AqlmLoraLinear(target, adapter_name, config=config, **kwargs)
