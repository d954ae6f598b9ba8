# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers of Transformer Engine: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.weights import find_weight, is_a

from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from .config import LoraConfig


class TeLinear(LoraLinearBase):
    """LoRA on `transformer_engine.pytorch.Linear`, in float8 or not."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False

    def _base_bias(self) -> torch.Tensor | None:
        return find_weight(self.get_base_layer()).bias


def dispatch_transformer_engine(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """A `TeLinear` around a linear layer of Transformer Engine; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_a(base, "transformer_engine.pytorch.module.linear.Linear"):
        return None
    return TeLinear(target, adapter_name, config=config, **kwargs)
