# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers that Intel Neural Compressor converted: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.weights import is_a

from .layer.linear import Linear

if TYPE_CHECKING:
    from .config import LoraConfig


class IncLoraLinear(Linear):
    """LoRA on Intel Neural Compressor's `PatchedLinear` (float8)."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_inc(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `IncLoraLinear` around a layer that Intel Neural Compressor converted; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_a(base, "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear"):
        return None
    return IncLoraLinear(target, adapter_name, config=config, **kwargs)
