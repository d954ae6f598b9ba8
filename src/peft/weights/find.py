# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which storage format a layer's weight is in, told by the names of its classes, so that a quantiser is imported only
when one of its layers is met."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .aqlm import AqlmWeight
from .awq import AwqWeight
from .base import BaseWeight
from .bnb import ShardedWeight4bit, Weight4bit, Weight8bit
from .closed import ClosedWeight
from .compressed import CompressedTensorsWeight, is_compressed_tensors
from .eetq import EetqWeight
from .fp8 import Float8Weight
from .gptq import GptqWeight
from .hqq import HqqWeight
from .inc import IncWeight
from .offloaded import OffloadedWeight, offload_hook
from .plain import PlainWeight
from .sharded import ShardedWeight, innermost, shards_of
from .te import TeWeight
from .torchao import TorchaoWeight, is_torchao_tensor

_Maker = Callable[[nn.Module, bool], BaseWeight]

_BY_NAME: dict[str, _Maker] = {
    "bitsandbytes.nn.modules.Linear4bit": lambda layer, fan_in_fan_out: Weight4bit(layer),
    "bitsandbytes.nn.modules.Linear8bitLt": lambda layer, fan_in_fan_out: Weight8bit(layer),
    "hqq.core.quantize.HQQLinear": lambda layer, fan_in_fan_out: HqqWeight(layer),
    "gptqmodel.nn_modules.qlinear.torch.TorchLinear": lambda layer, fan_in_fan_out: GptqWeight(layer),
    "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear": lambda layer, fan_in_fan_out: AwqWeight(layer),
    "gptqmodel.nn_modules.qlinear.gemm_awq.AwqGEMMLinear": lambda layer, fan_in_fan_out: AwqWeight(layer),
    "gptqmodel.nn_modules.qlinear.gemm_awq_triton.AwqGEMMTritonLinear": lambda layer, fan_in_fan_out: AwqWeight(layer),
    # It rotates its input, unlike the layer that it derives from.
    "gptqmodel.nn_modules.qlinear.paroquant.ParoLinear": lambda layer, fan_in_fan_out: ClosedWeight(layer),
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": lambda layer, fan_in_fan_out: ClosedWeight(layer),
    "awq.modules.linear.gemm.WQLinear_GEMM": lambda layer, fan_in_fan_out: AwqWeight(layer),
    "aqlm.inference.QuantizedLinear": lambda layer, fan_in_fan_out: AqlmWeight(layer),
    "transformers.integrations.eetq.EetqLinear": lambda layer, fan_in_fan_out: EetqWeight(layer),
    "eetq.modules.qlinear.EETQLinear": lambda layer, fan_in_fan_out: EetqWeight(layer),
    "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear": (
        lambda layer, fan_in_fan_out: IncWeight(layer)
    ),
    "transformer_engine.pytorch.module.linear.Linear": lambda layer, fan_in_fan_out: TeWeight(layer),
    "transformers.pytorch_utils.Conv1D": lambda layer, fan_in_fan_out: PlainWeight(layer, transposed=True),
    "torch.nn.modules.sparse.Embedding": lambda layer, fan_in_fan_out: PlainWeight(layer, transposed=True),
    "transformers.integrations.finegrained_fp8.FP8Linear": lambda layer, fan_in_fan_out: Float8Weight(layer),
    "transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear": (
        lambda layer, fan_in_fan_out: Float8Weight(layer)
    ),
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear": lambda layer, fan_in_fan_out: Float8Weight(layer),
    "torch.nn.modules.linear.Linear": PlainWeight,
    "torch.nn.modules.conv.Conv1d": lambda layer, fan_in_fan_out: PlainWeight(layer),
    "torch.nn.modules.conv.Conv2d": lambda layer, fan_in_fan_out: PlainWeight(layer),
    "torch.nn.modules.conv.Conv3d": lambda layer, fan_in_fan_out: PlainWeight(layer),
}
_NOT_A_MATRIX = {
    # The first dimension is the input, and groups do not flatten: no matrix [out, in] is a view of it.
    "torch.nn.modules.conv._ConvTransposeNd": "the weight of a transposed convolution",
    "transformers.integrations.finegrained_fp8.FP8GroupedLinear": "a stack of matrices, one a group of the input",
}

_makers: WeakKeyDictionary[type, _Maker] = WeakKeyDictionary()


def find_weight(layer: nn.Module, fan_in_fan_out: bool = False) -> BaseWeight:
    """The weight of a base layer, whatever format it is stored in.

    Known are `nn.Linear`, transformers' `Conv1D`, `nn.Conv1d/2d/3d`, `nn.Embedding`, bitsandbytes' `Linear4bit` and
    `Linear8bitLt`, HQQ's `HQQLinear`, gptqmodel's linear layers, autoawq's for GEMM, those of AQLM, EETQ, Intel Neural
    Compressor and Transformer Engine, transformers' float8 ones, and their subclasses, and `nn.Linear` with a tensor of
    torchao's classes or a scheme of compressed-tensors. Any other module with a floating `weight` of two or more
    dimensions counts as plain, with the output features first. A plain
    weight that accelerate offloaded is read by `OffloadedWeight`, one that is sharded now by `ShardedWeight`.

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
        if is_torchao_tensor(getattr(inner, "weight", None)):
            return TorchaoWeight(inner)
        if is_compressed_tensors(inner):
            return CompressedTensorsWeight(inner)
        _check_plain(inner)
    weight = maker(inner, fan_in_fan_out)
    if type(weight) is PlainWeight and inner.weight.is_meta:
        hook = offload_hook(inner)
        return weight if hook is None else OffloadedWeight(weight, hook)
    return weight


def is_a(layer: nn.Module, name: str) -> bool:
    """Whether a layer is of the class of this qualified name, or of one derived from it; nothing is imported."""
    return name in _names(type(layer))


def _names(kind: type) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]


def _choose(kind: type) -> _Maker:
    names = _names(kind)
    for name in names:
        if name in _NOT_A_MATRIX:
            raise TypeError(f"{kind.__name__}: {_NOT_A_MATRIX[name]} cannot be read as a matrix [out, in]")
    return next((_BY_NAME[name] for name in names if name in _BY_NAME), PlainWeight)


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
