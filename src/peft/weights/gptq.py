# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights in the layout of GPTQ (Frantar et al., arXiv 2210.17323) that gptqmodel's PyTorch and Triton layers read.
This module needs only tensors; gptqmodel is imported for its planar layouts alone."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from .base import Packed, bears, stamp, untouched
from .formats import Format, register
from .stored import StoredWeight
from .words import BLOCK, nearest, pack, unpack, unpack_columns

# What a merge takes at a time, of all temporaries together.
CHUNK_BYTES = 256 * 2**20


class WordsWeight(StoredWeight):
    """Integers in words (`qweight`), stored by input feature, with a scale (`scales` [groups, out]) and an integer zero
    point (`qzeros`) for each group of inputs and each output: w = (q − z)·s, rounded to the scales' dtype."""

    kinds: frozenset[tuple[str, str]] = frozenset()  # the classes whose forward pass is `x @ W.T + bias`

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def bits(self) -> int:
        return self.layer.bits

    @property
    def trainable(self) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.qweight.device

    @abstractmethod
    def _codes(self, a: int, b: int) -> torch.Tensor:
        """The integers of rows a to b, [in, b - a]."""

    @abstractmethod
    def _zeros(self, a: int, b: int) -> torch.Tensor:
        """The zero points of rows a to b, [groups, b - a]."""

    @abstractmethod
    def _pack(self, codes: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`qweight` and `qzeros` of integers [in, n] and zero points [groups, n], n a multiple of 32 or all rows."""

    @property
    def order(self) -> torch.Tensor | None:
        """The group of each input feature, int32 [in]; None where `group_size` neighbours make one."""
        return None

    def groups(self) -> torch.Tensor:
        """The group of each input feature, int64 [in]."""
        return self._neighbours() if self.order is None else self.order.long()

    def _neighbours(self) -> torch.Tensor:
        return torch.arange(self.shape[1], device=self.device) // self.layer.group_size

    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`; rounded to the nearest integers, without GPTQ's or AWQ's calibration."""
        self._check_matrix(matrix)
        (out, features), group = self.shape, self.groups()
        # Of one row at a time about ten float32 copies live together.
        step = max(1, CHUNK_BYTES // (40 * features * BLOCK)) * BLOCK
        words, zeros, scales = [], [], []
        for a in range(0, out, step):
            b = min(a + step, out)
            codes, scale, zero = nearest(
                matrix[a:b].detach().to(self.device, torch.float32),
                self.rows(a, b, torch.float32),
                self.layer.scales[:, a:b].T,
                self._zeros(a, b).T,
                group,
                self.bits,
            )
            packed = self._pack(codes.T, zero.T)
            for parts, part in zip((words, zeros, scales), (*packed, scale.T), strict=True):
                parts.append(part)
        self._put({name: torch.cat(parts, 1) for name, parts in zip(_WRITTEN, (words, zeros, scales), strict=True)})

    def _put(self, new: dict[str, torch.Tensor]) -> None:
        super()._put(new)
        if hasattr(self.layer, "clear_weight_cache"):
            self.layer.clear_weight_cache()

    def packed(self) -> Packed | None:
        layer = self.layer
        stored = layer.qweight, layer.qzeros, layer.scales
        if layer.qweight.dtype != torch.int32 or not all(tensor.is_contiguous() for tensor in stored):
            return None
        return Packed(
            kind=self.format,
            data=layer.qweight,
            shape=self.shape,
            dtype=self.dtype,
            bits=self.bits,
            scales=layer.scales,
            zeros=layer.qzeros,
            blocksize=layer.group_size if self.order is None else None,
            groups=self.order,
        )

    def direct(self) -> bool:
        layer = self.layer
        kind = type(layer)
        return (
            (kind.__module__, kind.__qualname__) in self.kinds
            and getattr(layer, "adapter", None) is None
            and untouched(layer, layer.qweight)
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.layer, name) for name in _WRITTEN}

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        setattr(self.layer, name, tensor)

    def _read(self, a: int, b: int) -> torch.Tensor:
        group = self.groups()
        difference = self._codes(a, b) - self._zeros(a, b)[group]
        return (self.layer.scales[:, a:b][group] * difference).T


_WRITTEN = ("qweight", "qzeros", "scales")


def _is_captured(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class GptqWeight(WordsWeight):
    """The weight of gptqmodel's `TorchLinear` and `TritonV2Linear`, of 2 to 8 bits, in any order of groups (`g_idx`)."""

    format = "gptq"
    kinds = frozenset(
        (
            ("gptqmodel.nn_modules.qlinear.torch", "TorchLinear"),
            ("gptqmodel.nn_modules.qlinear.tritonv2", "TritonV2Linear"),
        )
    )

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._ordered: tuple[tuple, bool] | None = None  # the stamp of `g_idx`, and whether neighbours make the groups
        if getattr(layer, "had_K", None) is not None:
            raise TypeError(
                f"{type(layer).__name__} rotates its input (had_K): its weight cannot be read as a matrix [out, in]"
            )

    @property
    def order(self) -> torch.Tensor | None:
        """As `WordsWeight.order`: what `g_idx` says is looked at once, since the host has to wait for it."""
        g_idx, size = self.layer.g_idx, self.layer.group_size
        if self._ordered is None or not bears(g_idx, self._ordered[0]):
            if size <= 0 or g_idx.is_meta or g_idx.is_inference() or _is_captured(g_idx):
                return g_idx
            self._ordered = stamp(g_idx), torch.equal(g_idx, self._neighbours().to(g_idx.dtype))
        return None if self._ordered[1] else g_idx

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**super().tensors(), "g_idx": self.layer.g_idx}

    @property
    def planar(self) -> bool:
        """Whether the bits of an integer are stored apart, as 5 to 7 bits always are."""
        return getattr(self.layer, "planar", False)

    def packed(self) -> Packed | None:
        return None if self.planar else super().packed()

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        fused = getattr(self.layer, "dequantize_weight", None)
        if fused is None or self.device.type == "cpu":
            return super().dense(dtype)
        matrix = fused().T  # one compiled pass, to the same bits: it rounds once too
        return matrix if dtype is None else matrix.to(dtype)

    def _codes(self, a: int, b: int) -> torch.Tensor:
        words = self.layer.qweight[:, a:b]
        if self.planar:
            from gptqmodel.utils.planar_packing import planar_unpack_rows

            return planar_unpack_rows(words, self.bits)[: self.shape[1]].to(torch.int16)
        return unpack(words, self.bits, self.shape[1])

    def _zeros(self, a: int, b: int) -> torch.Tensor:
        if self.planar:
            from gptqmodel.utils.planar_packing import planar_unpack_cols

            return planar_unpack_cols(self.layer.qzeros, self.bits)[:, a:b].to(torch.int16)
        return unpack_columns(self.layer.qzeros, self.bits, a, b, self.shape[0])

    def _pack(self, codes: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.layer.qweight.dtype
        if self.planar:
            from gptqmodel.utils.planar_packing import planar_pack_cols, planar_pack_rows

            wide = codes.to(torch.int64), zeros.to(torch.int64)
            return (
                planar_pack_rows(wide[0], self.bits, pack_dtype=dtype),
                planar_pack_cols(wide[1], self.bits, pack_dtype=dtype),
            )
        return pack(codes, self.bits, dtype), pack(zeros.T, self.bits, dtype).T


register(
    Format(
        "GPTQ",
        GptqWeight,
        ("gptqmodel.nn_modules.qlinear.torch.TorchLinear",),
        verified="CPU",
        remark="gptqmodel's backends with the common layout",
    )
)
