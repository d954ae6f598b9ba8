# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on bitsandbytes' quantised linear layers: the names; what they do is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.import_utils import is_bnb_4bit_available, is_bnb_available

from .layer.base import VARIANT_KWARG_KEYS
from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from .config import LoraConfig


class Linear4bit(LoraLinearBase):
    """LoRA on bitsandbytes' `Linear4bit` (NF4, FP4; QLoRA, arXiv 2305.14314)."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


class Linear8bitLt(LoraLinearBase):
    """LoRA on bitsandbytes' `Linear8bitLt` (LLM.int8(), arXiv 2208.07339)."""

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `Linear4bit` around a 4-bit layer of a model that was loaded in 4 bits; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not kwargs.get("loaded_in_4bit", False) or not is_bnb_4bit_available():
        return None
    import bitsandbytes as bnb

    return Linear4bit(target, adapter_name, config=config, **kwargs) if isinstance(base, bnb.nn.Linear4bit) else None


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `Linear8bitLt` around an 8-bit layer of a model that was loaded in 8 bits; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not kwargs.get("loaded_in_8bit", False) or not is_bnb_available():
        return None
    import bitsandbytes as bnb

    return (
        Linear8bitLt(target, adapter_name, config=config, **kwargs) if isinstance(base, bnb.nn.Linear8bitLt) else None
    )


__all__ = ["VARIANT_KWARG_KEYS", "Linear4bit", "Linear8bitLt", "dispatch_bnb_4bit", "dispatch_bnb_8bit"]
