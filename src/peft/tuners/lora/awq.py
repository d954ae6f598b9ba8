# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers that AWQ quantised: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.utils.other import is_gptqmodel_awq_layer
from peft.weights import is_a

from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from .config import LoraConfig


class AwqLoraLinear(LoraLinearBase):
    """LoRA on one of gptqmodel's linear layers in the AWQ format, or on autoawq's."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_awq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `AwqLoraLinear` around gptqmodel's or autoawq's AWQ layer; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_gptqmodel_awq_layer(base) and not is_a(base, "awq.modules.linear.gemm.WQLinear_GEMM"):
        return None
    return AwqLoraLinear(target, adapter_name, config=config, **kwargs)
