# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The layers that hold LoRA adapters, one file a kind of base layer, and the choice among them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.engine.layer import BaseTunerLayer, check_adapters_to_merge
from peft.utils.constants import ALLOWED_COMPUTE_DTYPES
from peft.utils.other import transpose
from peft.weights import reader_of

from .attention import MultiheadAttention
from .base import VARIANT_KWARG_KEYS, LoraLayer
from .conv import Conv1d, Conv2d, Conv3d, _ConvNd
from .embedding import Embedding, LoraEmbeddingATPHolder
from .linear import Linear, LoraLinearBase
from .param import ParamWrapper, _LoraParameterProxy
from .variant import LoraVariant

if TYPE_CHECKING:
    from ..config import LoraConfig


def dispatch_default(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """A LoRA layer around one of PyTorch's own layers, transformers' `Conv1D` or a linear layer in a storage format that
    has no LoRA class of its own; None for any other.

    Args:
        target: Layer to adapt, possibly one that another tuner wraps already.
        adapter_name: Name of the adapter.
        config: Its settings; `fan_in_fan_out` is corrected where it contradicts the layer.
        parameter_name: Set where a bare parameter is to be adapted, which no layer here does.
    """
    if parameter_name is not None:
        return None
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for base_class, layer_class in (
        (nn.Embedding, Embedding),
        (nn.Conv1d, Conv1d),
        (nn.Conv2d, Conv2d),
        (nn.Conv3d, Conv3d),
        (nn.MultiheadAttention, MultiheadAttention),
    ):
        if isinstance(base, base_class):
            return layer_class(target, adapter_name, config=config, **kwargs)
    if isinstance(base, (nn.Linear, Conv1D)) or reader_of(base) is not None:
        transposed = isinstance(base, Conv1D)
        if config.fan_in_fan_out != transposed:
            warnings.warn(
                f"fan_in_fan_out={config.fan_in_fan_out} does not fit {type(base).__name__}; it is set to {transposed}.",
                stacklevel=2,
            )
            config.fan_in_fan_out = transposed
        return Linear(target, adapter_name, config=config, is_target_conv_1d_layer=transposed, **kwargs)
    return None


# The path that other packages know these classes by, in pickles and when they compare qualified names.
for _cls in (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraEmbeddingATPHolder,
    LoraLayer,
    LoraVariant,
    MultiheadAttention,
    ParamWrapper,
    _LoraParameterProxy,
):
    _cls.__module__ = __name__

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "VARIANT_KWARG_KEYS",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraEmbeddingATPHolder",
    "LoraLayer",
    "LoraLinearBase",
    "LoraVariant",
    "MultiheadAttention",
    "ParamWrapper",
    "_ConvNd",
    "_LoraParameterProxy",
    "check_adapters_to_merge",
    "dispatch_default",
    "transpose",
]
