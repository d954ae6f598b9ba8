# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What a storage format answers about the weight of a base layer. The weight is seen as one matrix [out, in] with one
row per output feature, whatever the layer's own orientation or packing is."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules import module as _torch_module


@dataclass(frozen=True)
class Packed:
    """The stored bytes of a quantised weight, as kernels read them. All tensors are the live ones, not copies.

    Attributes:
        kind: "nf4" or "fp4" (two codes a byte, the first in the high half, in row-major order of [out, in]), "int8"
            (one byte an element, row-major), or integers q of `bits` bits in groups, w = (q - z) * s: "gptq", "awq" or
            "hqq".
        data: Flat uint8 [ceil(out * in / 2)] for "nf4" and "fp4"; int8 [out, in] for "int8". For "gptq" int32
            [ceil(in * bits / 32), out], a stream of bits down each column, the first integer in the lowest bits. For
            "awq" int32 [in, ceil(out * bits / 32)], a stream along each row, every eight 4-bit integers of it in the
            order 0, 2, 4, 6, 1, 3, 5, 7. For "hqq" integers [plane_rows, in]: row r of the matrix stands in row
            r % plane_rows, and the rows that share one have their integers side by side, the first in the highest bits.
        shape: (out, in).
        dtype: The dtype that the format dequantises to when none is asked for.
        blocksize: Consecutive elements that share one scale: of the flattened matrix, or of a row of it for the grouped
            kinds. None where `groups` or `cycle_rows` tells.
        code: Float32 [16], the value of each code; 4 bit only.
        absmax: 4 bit only. Float32 [blocks], or uint8 [blocks] when `nested` is given.
        nested: `(absmax, code, blocksize, offset)` of the scales' own quantisation, else None: the scale of block `i` is
            `nested.code[absmax[i]] * nested.absmax[i // nested.blocksize] + offset`. Float32 [blocks of blocks],
            float32 [256], int, float32 [].
        scb: "int8" only. Float32 [out], the largest magnitude of each row: `w = data * scb / 127`.
        bits: Grouped kinds only, as all that follows: bits of an integer.
        scales: s: [groups, out]; for "hqq" flat, in the order of the groups.
        zeros: z: int32 [groups, ceil(out * bits / 32)], streams along each row in the order that `data` of "awq" has for
            "awq"; for "hqq" numbers, as `scales`.
        groups: int32 [in], the group of each input feature; None where `blocksize` tells.
        planes: "hqq" only: how many rows share one of `data`; the last ones may lie beyond the matrix.
        plane_rows: "hqq" only.
        cycle_rows: "hqq" only: row r has the groups `(r % cycle_rows) * in` and following, one an element; None where
            `blocksize` tells.
    """

    kind: str
    data: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int | None = None
    code: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    nested: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor] | None = None
    scb: torch.Tensor | None = None
    bits: int | None = None
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    planes: int | None = None
    plane_rows: int | None = None
    cycle_rows: int | None = None


class SameObject:
    """Equal to another one only while both refer to one and the same living object: an `id` that is never reused."""

    __slots__ = ("_ref",)

    def __init__(self, referent: Any) -> None:
        self._ref = weakref.ref(referent)

    def __eq__(self, other: object) -> bool:
        referent = self._ref()
        return referent is not None and isinstance(other, SameObject) and other._ref() is referent

    def __hash__(self) -> int:
        return id(self._ref())


def stamp(tensor: torch.Tensor) -> tuple:
    """Identity of a tensor's bytes: equal stamps mean that nobody wrote to them through torch in between.

    An inference tensor counts no versions, so its stamp equals no other.
    """
    version = object() if tensor.is_inference() else tensor._version
    return SameObject(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


def bears(tensor: torch.Tensor, stamped: tuple) -> bool:
    """Whether `stamp(tensor)` would equal `stamped`; the same object has the same dtype and device where its address is."""
    return (
        stamped[0]._ref() is tensor
        and tensor.data_ptr() == stamped[1]
        and not tensor.is_inference()
        and tensor._version == stamped[2]
    )


def held_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter as the module holds it: ZeRO-3 gathers one at each look at `_parameters`; this is a look past it.

    compressed-tensors keeps parameters in a mapping of its own that is no dict.
    """
    parameters = module.__dict__["_parameters"]
    return dict.get(parameters, name) if isinstance(parameters, dict) else parameters.get(name)


def comes_and_goes(layer: nn.Module) -> bool:
    """Whether somebody gathers a layer's weight for each pass and lets go of it afterwards (FSDP, ZeRO-3).

    What is written to the shards in between leaves no trace on the gathered tensor.
    """
    return "_is_fsdp_managed_module" in layer.__dict__ or hasattr(held_parameter(layer, "weight"), "ds_id")


def writing(tensor: torch.Tensor):
    """The context in which `tensor` may be written to in place."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


def overwrite(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """Give back a tensor that holds `new`: `old` itself, written in place, where it fits, else a copy of `new`.

    In place keeps the addresses that captured graphs have seen, and counts a version.
    """
    if new is None:
        return None
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device) or old.is_meta:
        return new.detach().clone()
    with writing(old):
        return old.copy_(new)


class BaseWeight(ABC):
    """The weight of one base layer, read through its storage format.

    Args:
        layer: The base layer. It is referenced, never changed except by `write` and `restore`.

    Attributes:
        format: Name of the storage format, for messages.
        layer: The base layer.
    """

    format: ClassVar[str] = ""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __repr__(self) -> str:
        out, features = self.shape
        return f"{type(self).__name__}({self.format}, [{out}, {features}], {self.dtype}, {self.device})"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the logical matrix."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that `dense()` gives when none is asked for."""

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias [out], or None."""
        # nn.Module looks for a missing attribute in several places, which every forward pass would pay for.
        parameters = self.layer.__dict__["_parameters"]
        return parameters["bias"] if "bias" in parameters else getattr(self.layer, "bias", None)

    @property
    def trainable(self) -> bool:
        """True when the weight itself asks for a gradient."""
        return self.layer.weight.requires_grad

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that the layer casts its input to before the product (and back after it); None: no cast."""
        return None

    @property
    def differentiable(self) -> bool:
        """False where autograd does not get through the layer's own forward pass to its input."""
        return True

    @property
    @abstractmethod
    def lossy(self) -> bool:
        """True when `write` does not keep exactly what it was given, so that only `restore` can undo it."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole matrix [out, in], without gradient; where nothing has to be converted it is a view, not a copy.

        Args:
            dtype: A floating dtype; None for the format's own (`self.dtype`).
        """

    @abstractmethod
    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows a to b of `dense(dtype)`, [b - a, in], with the same bits and without building more than these.

        Raises:
            IndexError: `0 <= a <= b <= out` does not hold.
        """

    @abstractmethod
    def write(self, matrix: torch.Tensor) -> None:
        """Store `matrix` [out, in] of any floating dtype in the layer, in place, in the format it has now.

        Raises:
            ValueError: The shape is not (out, in), or the dtype is not a floating one.
        """

    def why_read_only(self) -> str | None:
        """Why `write` refuses any matrix, a full sentence with the remedy; None where the format can be written."""
        return None

    @abstractmethod
    def snapshot(self) -> Any:
        """A copy of the stored bytes, for `restore`. It holds whatever happens to the layer in between."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Give the layer back the bytes of `snapshot`, bit for bit, on the device where it is now.

        The snapshot can be used again.
        """

    @abstractmethod
    def key(self) -> tuple:
        """Identity of the stored bytes: as long as keys compare equal, the weight is the same.

        What nobody can see is a write behind torch's back (through `.data` or a raw pointer): after one, call
        `peft.dora.invalidate`.
        """

    @property
    def comes_and_goes(self) -> bool:
        """Whether the weight and what is sharded with it is gathered anew for each pass, and gone in between."""
        return comes_and_goes(self.layer)

    def has_key(self, key: tuple) -> bool:
        """`key() == key`; formats that can tell more cheaply do."""
        return self.key() == key

    def reader_of_shards(self) -> type | None:
        """What reads the layer while its bytes are spread over processes; None: what reads a plain weight's shards."""
        return None

    def packed(self) -> Packed | None:
        """The stored bytes for kernels that read them, or None where no kernel can."""
        return None

    def direct(self) -> bool:
        """True when `x @ dense().T + bias` may stand for `layer(x)`: the layer's class is exactly one that we know,
        nobody replaced its forward, hooked it, offloaded it or sharded its weight.

        Never where a format does not say when: its layers round their input too, settle what they do in each call, or
        multiply by what is stored for a fraction of what the dense matrix costs.
        """
        return False

    def _check_rows(self, a: int, b: int) -> None:
        if not 0 <= a <= b <= self.shape[0]:
            raise IndexError(f"rows({a}, {b}) of a weight with {self.shape[0]} rows: expected 0 <= a <= b <= out")

    def _check_matrix(self, matrix: torch.Tensor) -> None:
        if tuple(matrix.shape) != self.shape:
            raise ValueError(
                f"write(matrix) to a {self.format} {type(self.layer).__name__}: the shape must be {self.shape} "
                f"(out, in), got {tuple(matrix.shape)}"
            )
        if not matrix.is_floating_point():
            raise ValueError(
                f"write(matrix) to a {self.format} {type(self.layer).__name__}: the dtype must be a floating one, "
                f"got {matrix.dtype}"
            )


_PLAIN_TYPES = (nn.Parameter, torch.Tensor)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward: hooks, or a forward set on the instance."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def untouched(layer: nn.Module, weight: torch.Tensor, own_type: type = nn.Parameter) -> bool:
    """True when calling `layer` runs its class's forward and nothing else, on a weight that is here and whole."""
    return (
        not is_hooked(layer)
        and "_hf_hook" not in layer.__dict__
        and type(layer).__call__ is _torch_module.Module.__call__
        and type(weight) in (*_PLAIN_TYPES, own_type)
        and not weight.is_meta
        and not hasattr(weight, "ds_id")
    )
