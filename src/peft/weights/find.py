# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which storage format a layer's weight is in, told by the names of its classes, so that a quantiser is imported only
when one of its layers is met."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .base import BaseWeight
from .bnb import ShardedWeight4bit, Weight4bit, Weight8bit
from .plain import PlainWeight
from .sharded import ShardedWeight, innermost, shards_of

_Maker = Callable[[nn.Module, bool], BaseWeight]

_BY_NAME: dict[str, _Maker] = {
    "bitsandbytes.nn.modules.Linear4bit": lambda layer, fan_in_fan_out: Weight4bit(layer),
    "bitsandbytes.nn.modules.Linear8bitLt": lambda layer, fan_in_fan_out: Weight8bit(layer),
    "transformers.pytorch_utils.Conv1D": lambda layer, fan_in_fan_out: PlainWeight(layer, transposed=True),
    "torch.nn.modules.sparse.Embedding": lambda layer, fan_in_fan_out: PlainWeight(layer, transposed=True),
    "torch.nn.modules.linear.Linear": PlainWeight,
    "torch.nn.modules.conv.Conv1d": lambda layer, fan_in_fan_out: PlainWeight(layer),
    "torch.nn.modules.conv.Conv2d": lambda layer, fan_in_fan_out: PlainWeight(layer),
    "torch.nn.modules.conv.Conv3d": lambda layer, fan_in_fan_out: PlainWeight(layer),
}
# Their first dimension is the input, and groups do not flatten: no matrix [out, in] is a view of them.
_NOT_A_MATRIX = "torch.nn.modules.conv._ConvTransposeNd"

_makers: WeakKeyDictionary[type, _Maker] = WeakKeyDictionary()


def find_weight(layer: nn.Module, fan_in_fan_out: bool = False) -> BaseWeight:
    """The weight of a base layer, whatever format it is stored in.

    Known are `nn.Linear`, transformers' `Conv1D`, `nn.Conv1d/2d/3d`, `nn.Embedding`, bitsandbytes' `Linear4bit` and
    `Linear8bitLt`, and their subclasses. Any other module with a floating `weight` of two or more dimensions counts as
    plain, with the output features first. A weight that is sharded now is read by `ShardedWeight`.

    Args:
        layer: The base layer itself, not the adapter layer around it; it may be in FSDP's wrapper.
        fan_in_fan_out: The weight of a linear or unknown layer is stored [in, out]. Layers that are known to store it
            one way keep to that.

    Raises:
        TypeError: The layer has no weight that can be read as a matrix, or keeps it in a format that is not supported.
    """
    inner = innermost(layer)
    kind = type(inner)
    maker = _makers.get(kind)
    if maker is None:
        maker = _makers[kind] = _choose(kind)
    shards = shards_of(layer)
    if shards is not None:
        plain = maker(inner, fan_in_fan_out)
        # Until it is quantised a bitsandbytes layer holds a plain weight.
        packed = isinstance(plain, Weight4bit) and getattr(inner, "quant_state", None) is not None
        return (ShardedWeight4bit if packed else ShardedWeight)(layer, plain, shards)
    if maker is PlainWeight:
        _check_plain(inner)
    return maker(inner, fan_in_fan_out)


def _choose(kind: type) -> _Maker:
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    if _NOT_A_MATRIX in names:
        raise TypeError(
            f"{kind.__name__}: the weight of a transposed convolution cannot be read as a matrix [out, in]"
        )
    return next((_BY_NAME[name] for name in names if name in _BY_NAME), PlainWeight)


def _check_plain(layer: nn.Module) -> None:
    """Refuse what only looks like a plain weight. Packed formats keep integers, or a tensor class of their own."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        held = [key for key in ("qweight", "W_q", "codes") if hasattr(layer, key)]
        hint = f" (it keeps a packed `{held[0]}`, a format that has no reader here)" if held else ""
        raise TypeError(f"{name} has no `weight` tensor{hint}: its weight cannot be read as a matrix [out, in]")
    package = type(weight).__module__.partition(".")[0]
    if package == "torchao":
        raise TypeError(f"{name}: its weight is a torchao {type(weight).__name__}, a format that has no reader here")
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.dim() < 2:
        raise TypeError(
            f"{name}: its `weight` of dtype {weight.dtype} and shape {tuple(weight.shape)} cannot be read as a matrix "
            "[out, in]; expected float16, bfloat16, float32 or float64 and two or more dimensions"
        )
