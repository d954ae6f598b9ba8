# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What reads a layer's weight: one of the registered formats, or the plain one in the layer's orientation."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from .base import BaseWeight
from .formats import names_of, reader_of, reader_of_plain
from .offloaded import OffloadedWeight, offload_hook
from .plain import PlainWeight
from .sharded import ShardedWeight, innermost, shards_of

# Whether a plain weight is stored [in, out], whatever `fan_in_fan_out` says.
_TRANSPOSED = {
    "transformers.pytorch_utils.Conv1D": True,
    "torch.nn.modules.sparse.Embedding": True,
    "torch.nn.modules.conv.Conv1d": False,
    "torch.nn.modules.conv.Conv2d": False,
    "torch.nn.modules.conv.Conv3d": False,
}
# The first dimension is the input, and groups do not flatten: no matrix [out, in] is a view of it.
_NOT_A_MATRIX = "torch.nn.modules.conv._ConvTransposeNd"

_transposed: WeakKeyDictionary[type, bool | None] = WeakKeyDictionary()


def find_weight(layer: nn.Module, fan_in_fan_out: bool = False) -> BaseWeight:
    """The weight of a base layer, whatever format it is stored in.

    Known are `nn.Linear`, transformers' `Conv1D`, `nn.Conv1d/2d/3d`, `nn.Embedding`, the layers of the registered formats
    (`peft.weights.formats.FORMATS`), and their subclasses. Any other module with a floating `weight` of two or more
    dimensions counts as plain, with the output features first. A plain weight that accelerate offloaded is read by
    `OffloadedWeight`, one that is sharded now by `ShardedWeight`.

    Args:
        layer: The base layer itself, not the adapter layer around it; it may be in FSDP's wrapper.
        fan_in_fan_out: The weight of a linear or unknown layer is stored [in, out]. Layers that are known to store it
            one way keep to that.

    Raises:
        TypeError: The layer has no weight that can be read as a matrix, or keeps it in a format that is not supported.
    """
    inner = innermost(layer)
    shards = shards_of(layer)
    weight = _weight_of(inner, fan_in_fan_out, shards is not None)
    if shards is not None:
        return (weight.reader_of_shards() or ShardedWeight)(layer, weight, shards)
    if type(weight) is PlainWeight and inner.weight.is_meta:
        hook = offload_hook(inner)
        return weight if hook is None else OffloadedWeight(weight, hook)
    return weight


def _weight_of(layer: nn.Module, fan_in_fan_out: bool, sharded: bool) -> BaseWeight:
    reader = reader_of(layer)
    if reader is not None:
        return reader(layer)
    kind = type(layer)
    if kind not in _transposed:
        _transposed[kind] = _is_transposed(kind)
    transposed = _transposed[kind]
    if transposed is None and not sharded:
        reader = reader_of_plain(layer)
        if reader is not None:
            return reader(layer)
        _check_plain(layer)
    return PlainWeight(layer, fan_in_fan_out if transposed is None else transposed)


def _is_transposed(kind: type) -> bool | None:
    """How a class stores its plain weight; None where `fan_in_fan_out` says it."""
    names = names_of(kind)
    if _NOT_A_MATRIX in names:
        raise TypeError(
            f"{kind.__name__}: the weight of a transposed convolution cannot be read as a matrix [out, in]"
        )
    return next((_TRANSPOSED[name] for name in names if name in _TRANSPOSED), None)


def _check_plain(layer: nn.Module) -> None:
    """Refuse what only looks like a plain weight. Packed formats keep integers, or a tensor class of their own."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        held = [key for key in ("qweight", "W_q", "codes") if hasattr(layer, key)]
        hint = f" (it keeps a packed `{held[0]}`, a format that has no reader here)" if held else ""
        raise TypeError(f"{name} has no `weight` tensor{hint}: its weight cannot be read as a matrix [out, in]")
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.dim() < 2:
        raise TypeError(
            f"{name}: its `weight` of dtype {weight.dtype} and shape {tuple(weight.shape)} cannot be read as a matrix "
            "[out, in]; expected float16, bfloat16, float32 or float64 and two or more dimensions"
        )
