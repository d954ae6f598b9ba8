# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that are tensors of torchao's classes: int8, int4, intx and float8, weight-only or with rounded activations.
torchao is met only when one of its tensors is; what is needed beyond its methods is imported then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import overwrite, untouched
from .formats import Format, register
from .stored import StoredWeight
from .through import read_through

_TORCHS_OWN = (torch.Tensor, nn.Parameter)
# Attributes that say how a tensor class rounds the activations; None: it leaves them as they are.
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_mapping_type")


def is_torchao_tensor(weight: Any) -> bool:
    """True for a tensor of one of torchao's own classes."""
    kind = type(weight)  # that of most weights is told without its module's name, which Dynamo does not trace
    return (
        kind not in _TORCHS_OWN and issubclass(kind, torch.Tensor) and kind.__module__.partition(".")[0] == "torchao"
    )


class TorchaoWeight(StoredWeight):
    """The weight of a linear layer that `torchao.quantization.quantize_` (or transformers' `TorchAoConfig`) changed.

    It is read by the tensor's own `dequantize`; the int4 classes have none and are read through their product. It is
    written by the class's own `from_hp`, with the block size and kind of rounding that it has.
    """

    format = "torchao"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if type(layer.weight).__name__ == "NF4Tensor":
            raise TypeError(
                f"{type(layer).__name__}: its weight is a torchao NF4Tensor, a format that has no reader here: quantise "
                "with bitsandbytes' Linear4bit (NF4) or another torchao configuration"
            )

    @property
    def differentiable(self) -> bool:
        return _dequantises(self.layer.weight) and not self._rounds_input()

    def _rounds_input(self) -> bool:
        weight = self.layer.weight
        float8 = getattr(weight, "activation_dtype", None) == torch.float8_e4m3fn
        return float8 or any(getattr(weight, name, None) is not None for name in _ACTIVATIONS)

    @torch.inference_mode(False)  # where torchao's tensors cannot be cut
    @torch.no_grad()
    def _read(self, a: int, b: int) -> torch.Tensor:
        weight = self.layer.weight.detach()
        if a == b:
            return torch.empty(0, self.shape[1], dtype=self.dtype, device=self.device)
        if _dequantises(weight):
            return _dequantised_rows(weight, a, b)
        if self._rounds_input():
            raise TypeError(
                f"a torchao {type(weight).__name__} that rounds its input cannot be read: it has no dequantize(). "
                "Quantise the layer by a configuration that leaves activations as they are"
            )
        return read_through(lambda unit: F.linear(unit, weight), self.shape, (a, b), self.dtype, self.device)

    def why_read_only(self) -> str | None:
        if type(self.layer.weight).__name__ in _REQUANTISE:
            return None
        return (
            f"the weight is a torchao {type(self.layer.weight).__name__}, which cannot be quantised anew here; written "
            f"are {', '.join(sorted(_REQUANTISE))}. Quantise the model to one of these, or merge into the dense model."
        )

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`; scales and zero points are chosen anew, each for its block.

        Raises:
            TypeError: torchao's class of the weight is one that cannot be quantised anew.
        """
        self._check_matrix(matrix)
        why_not = self.why_read_only()
        if why_not is not None:
            raise TypeError(why_not)
        weight = self.layer.weight.detach()
        dense = matrix.detach().to(weight.device, weight.dtype)
        scale = getattr(weight, "act_pre_scale", None)
        if scale is not None:
            dense = dense / scale
        fresh = _REQUANTISE[type(weight).__name__](weight, dense.contiguous())
        if scale is not None:
            fresh.act_pre_scale = scale
        self._put(fresh)

    @torch.inference_mode(False)
    def snapshot(self) -> torch.Tensor:
        return self.layer.weight.detach().clone()

    def restore(self, snapshot: torch.Tensor) -> None:
        # Copied by its parts: some classes give another dtype to the scales when the whole tensor is moved.
        self._put(_rebuilt(snapshot, lambda part: part.to(self.device, copy=True)))

    def tensors(self) -> dict[str, torch.Tensor]:
        # Writes to the whole tensor count a version of its own, writes to its parts one of theirs.
        weight = self.layer.weight
        return {"": weight, **{name: getattr(weight, name) for name in _parts(weight)}}

    def direct(self) -> bool:
        """Also where the product would be another kernel's: what a weight-only class computes is x times its matrix."""
        layer, weight = self.layer, self.layer.weight
        return (
            type(layer) is nn.Linear
            and nn.Linear.forward is _LINEAR_FORWARD
            and _dequantises(weight)
            and not self._rounds_input()
            and untouched(layer, weight, type(weight))
        )

    def _put(self, fresh: torch.Tensor) -> None:
        """Take over a tensor's parts, in place where they fit into what is there."""
        weight = self.layer.weight
        same = type(weight) is type(fresh) and _metadata(weight) == _metadata(fresh)
        if not same or any(_unlike(getattr(weight, name), getattr(fresh, name)) for name in _parts(fresh)):
            self.layer.weight = nn.Parameter(fresh, requires_grad=False)
            return
        for name in _parts(fresh):
            overwrite(getattr(weight, name), getattr(fresh, name))


_LINEAR_FORWARD = nn.Linear.forward


def _dequantises(weight: torch.Tensor) -> bool:
    return getattr(type(weight), "dequantize", None) is not torch.Tensor.dequantize


def _dequantised_rows(weight: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """Rows a to b in the weight's dtype, from the blocks that cover them."""
    out = weight.shape[0]
    size = getattr(weight, "block_size", (out,))[0]
    first, last = a // size * size, min(-(-b // size) * size, out)
    cover = weight if (first, last) == (0, out) else weight[first:last]
    matrix = cover.dequantize()[a - first : b - first]
    scale = getattr(weight, "act_pre_scale", None)
    return matrix if scale is None else matrix * scale


def _parts(weight: torch.Tensor) -> list[str]:
    return weight.__tensor_flatten__()[0]


def _metadata(weight: torch.Tensor) -> dict[str, Any]:
    context = dict(weight.__tensor_flatten__()[1])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in context.items()}


def _unlike(old: torch.Tensor, new: torch.Tensor) -> bool:
    return (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device)


def _rebuilt(weight: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same tensor with `change` applied to its parts."""
    names, context = weight.__tensor_flatten__()
    parts = {name: change(getattr(weight, name)) for name in names}
    return type(weight).__tensor_unflatten__(parts, context, weight.shape, weight.stride())


# ---- quantising anew -------------------------------------------------------------------------------------------------
def _mapping(weight: torch.Tensor) -> Any:
    """Whether the blocks are rounded around zero or around a zero point: no class stores it, its zero points tell."""
    from torchao.quantization import MappingType

    zero = weight.zero_point
    return MappingType.SYMMETRIC if zero is None or not zero.any() else MappingType.ASYMMETRIC


def _blocks(weight: torch.Tensor) -> Any:
    from torchao.quantization import PerBlock

    return PerBlock(tuple(weight.block_size))


def _int8(weight: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    return type(weight).from_hp(
        dense,
        _blocks(weight),
        mapping_type=_mapping(weight),
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        reduce_range=weight.reduce_range,
    )


def _float8(weight: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    return type(weight).from_hp(
        dense,
        weight.qdata.dtype,
        _blocks(weight),
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )


def _intx(weight: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    return type(weight).from_hp(
        dense,
        tuple(weight.block_size),
        weight.target_dtype,
        mapping_type=_mapping(weight),
        activation_quantization=weight.activation_quantization,
    )


def _int4(weight: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    extra = {} if not hasattr(weight, "activation_dtype") else {"activation_dtype": weight.activation_dtype}
    return type(weight).from_hp(dense, list(weight.block_size), **extra)


_REQUANTISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
    "Int4OpaqueTensor": _int4,
}


_ROWS = (
    ("int8", "Int8Tensor", "CPU", "weight-only, by row, group or tensor, and with dynamic activations"),
    ("float8", "Float8Tensor", "CPU", "weight-only on a CPU; with dynamic activations on a GPU alone"),
    ("intx (1 to 8 bits)", "IntxUnpackedToInt8Tensor", "CPU", "weight-only and with dynamic int8 activations"),
    ("int4 for CPUs", "Int4OpaqueTensor", "CPU", "read through its product"),
    ("int4 for GPUs, tiled", "Int4TilePackedTo4dTensor", "", "read through its product"),
    ("int4 for GPUs, plain", "Int4Tensor", "", "read through its product"),
)
register(
    *(
        Format(
            f"torchao {name}",
            TorchaoWeight,
            tells=lambda layer: is_torchao_tensor(getattr(layer, "weight", None)),
            tensor=tensor,
            verified=verified,
            remark=remark,
        )
        for name, tensor, verified, remark in _ROWS
    )
)
