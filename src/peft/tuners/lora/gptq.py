# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers that GPTQ quantised: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.utils.other import is_gptqmodel_awq_layer, is_gptqmodel_quant_linear

from .layer.linear import LoraLinearBase
from .variants.qalora import QALoraLinearVariant

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraVariant


class GPTQLoraLinear(LoraLinearBase):
    """LoRA, or QA-LoRA, on one of gptqmodel's linear layers in the GPTQ format (2 to 8 bits)."""

    knows_qalora = True

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None and config.use_qalora:
            raise ValueError(f"use_qalora=True together with {type(variant).__name__}: switch one of them off.")
        return QALoraLinearVariant() if config.use_qalora else variant


def dispatch_gptq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `GPTQLoraLinear` around a gptqmodel layer that is not in the AWQ format; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_gptqmodel_quant_linear(base) or is_gptqmodel_awq_layer(base):
        return None
    return GPTQLoraLinear(target, adapter_name, config=config, **kwargs)
