# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on linear layers whose weight is a torchao tensor: the name; what it does is the linear layer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.import_utils import is_torchao_available
from peft.weights.torchao import is_torchao_tensor

from .layer.linear import Linear

if TYPE_CHECKING:
    from .config import LoraConfig


class TorchaoLoraLinear(Linear):
    """LoRA on a linear layer that torchao quantised.

    Args:
        args, kwargs: As of `Linear`.
        get_apply_tensor_subclass: Gives the torchao configuration of the model; kept for those who ask. Merging quantises
            by what the weight says of itself.
    """

    def __init__(self, *args: Any, get_apply_tensor_subclass: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return False


def dispatch_torchao(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `TorchaoLoraLinear` around a linear layer with a torchao weight; None for anything else."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if (
        not isinstance(base, nn.Linear)
        or not is_torchao_tensor(getattr(base, "weight", None))
        or not is_torchao_available()
    ):
        return None
    return TorchaoLoraLinear(target, adapter_name, config=config, **kwargs)
