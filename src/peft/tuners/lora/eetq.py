# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers that EETQ quantised: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.weights import is_a

from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from .config import LoraConfig

_LAYERS = (
    "transformers.integrations.eetq.EetqLinear",
    "eetq.modules.qlinear.EETQLinear",
)


class EetqLoraLinear(LoraLinearBase):
    """LoRA on transformers' `EetqLinear` or EETQ's own (int8 rows, float16 activations)."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_eetq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `EetqLoraLinear` around a layer that EETQ quantised; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not any(is_a(base, name) for name in _LAYERS):
        return None
    return EetqLoraLinear(target, adapter_name, config=config, **kwargs)
