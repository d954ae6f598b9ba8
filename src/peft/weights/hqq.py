# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that HQQ (Badri and Shaji, 2023) keeps in 1 to 8 bits. This module needs only tensors until one of its weights
is written; hqq is imported then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .base import Packed, untouched
from .formats import Format, register
from .stored import StoredWeight

_CLASS = "hqq.core.quantize", "HQQLinear"
# The forward passes of an HQQLinear that are `x @ dequantize().T + bias`.
_FORWARDS = ("forward_pytorch", "forward_pytorch_backprop", "forward_aten", "forward_aten_backprop")


class Planes(NamedTuple):
    """Where element i of the flattened matrix lies: in plane i // size, at i % size, above `shift` bits.

    HQQ cuts the matrix into `count` equal planes and lays their integers side by side in each stored word, the first
    plane in the highest bits; the last plane may be longer than what is left of the matrix.
    """

    count: int
    size: int
    bits: int

    def shift(self, plane: int) -> int:
        return (self.count - 1 - plane) * self.bits


# Planes and bits of each of HQQ's packings. Where there is one plane, the words are the integers themselves.
_PACKINGS = {
    "8bit_u8": (1, 8),
    "4bit_u8": (2, 4),
    "3bit_32": (10, 3),
    "2bit_u8": (4, 2),
    "1bit_u8": (8, 1),
    None: (1, 8),
}


class HqqWeight(StoredWeight):
    """The weight of an `HQQLinear`: integers of 1 to 8 bits in groups of elements that follow one another (axis 1) or
    lie `out * in / group_size` apart (axis 0) in the flattened matrix.

    w = (q − z)·s, where the difference and the product are each rounded to the layer's compute dtype.
    """

    format = "hqq"

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def trainable(self) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.layer.W_q.device

    def write(self, matrix: torch.Tensor) -> None:
        """As `BaseWeight.write`; quantised by HQQ with the layer's own settings."""
        self._check_matrix(matrix)
        from hqq.core.quantize import Quantizer

        layer, meta = self.layer, self.layer.meta
        self._check_scales()
        settings = dict(layer.quant_config["weight_quant_params"])
        settings |= {"group_size": meta["group_size"], "view_as_float": meta["view_as_float"]}
        codes, fresh = Quantizer.quantize(
            matrix.detach().to(self.device, torch.float32),
            device=str(self.device),
            compute_dtype=layer.compute_dtype,
            bitpack=meta["packing"] is not None,
            **{name: value for name, value in settings.items() if name != "bitpack"},
        )
        scale, zero = (fresh[name].to(layer.compute_dtype) for name in ("scale", "zero"))
        new = {"zero_scale": torch.stack((zero, scale))} if "zero_scale" in meta else {"scale": scale, "zero": zero}
        self._put({"W_q": codes, **new})

    def packed(self) -> Packed | None:
        """None where groups or planes end within a row."""
        (out, features), meta, planes = self.shape, self.layer.meta, self._planes()
        group, along = meta["group_size"], meta["axis"] == 1
        words = self._words()
        cycle = out * features // group  # elements after which HQQ's groups repeat across the matrix
        if planes.size % features or (features % group if along else cycle % features) or words.is_floating_point():
            return None
        scale, zero = self._scales()
        return Packed(
            kind="hqq",
            data=words,
            shape=self.shape,
            dtype=self.dtype,
            bits=planes.bits,
            scales=scale,
            zeros=zero,
            blocksize=group if along else None,
            planes=planes.count,
            plane_rows=planes.size // features,
            cycle_rows=None if along else cycle // features,
        )

    def direct(self) -> bool:
        layer = self.layer
        kind = type(layer)
        forward = kind.__dict__.get("forward")
        return (
            (kind.__module__, kind.__qualname__) == _CLASS
            and getattr(forward, "__module__", None) == _CLASS[0]
            and getattr(forward, "__name__", None) in _FORWARDS
            and untouched(layer, layer.W_q)
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        meta = self.layer.meta
        scales = ("zero_scale",) if "zero_scale" in meta else ("scale", "zero")
        return {"W_q": self.layer.W_q, **{name: meta[name] for name in scales if name in meta}}

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        if name == "W_q":
            self.layer.W_q.data = tensor
        else:
            self.layer.meta[name] = tensor

    def _check_scales(self) -> None:
        meta = self.layer.meta
        if meta["quant_scale"] or meta["quant_zero"]:
            raise TypeError(
                f"an HQQLinear with quant_scale={meta['quant_scale']}, quant_zero={meta['quant_zero']}: scales that are "
                "quantised themselves, which hqq has given up, cannot be read here. Quantise the model again with both "
                "False"
            )

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s and z, one of each a group, flat."""
        self._check_scales()
        meta = self.layer.meta
        if "zero_scale" in meta:
            zero, scale = meta["zero_scale"].to(self.device).unbind()
        else:
            scale, zero = meta["scale"], meta["zero"]
        return scale.reshape(-1), zero.reshape(-1)

    def _words(self) -> torch.Tensor:
        """The stored words, flat, as the integers that they are."""
        meta = self.layer.meta
        words = self.layer.W_q.detach().reshape(-1)
        return words.view(meta["unpack_view_dtype"]) if meta["view_as_float"] and meta["packing"] else words

    def _planes(self) -> Planes:
        meta = self.layer.meta
        elements, group = math.prod(self.shape), meta["group_size"]
        count, bits = _PACKINGS[meta["packing"]]
        # Planes are whole lines of HQQ's [groups, group_size] (axis 1) or [group_size, groups] (axis 0).
        line = group if meta["axis"] == 1 else elements // group
        return Planes(count, -(-elements // (line * count)) * line, bits)

    def _read(self, a: int, b: int) -> torch.Tensor:
        features, meta = self.shape[1], self.layer.meta
        start, stop = a * features, b * features
        if start == stop:
            return torch.empty((b - a, features), dtype=self.dtype, device=self.device)
        group = meta["group_size"]
        if meta["axis"] == 0:
            first, last = start, stop
            pieces = self._across_groups(first, last)
        else:  # from the start of a group to the end of one
            first, last = start // group * group, -(-stop // group) * group
            pieces = self._along_groups(first, last)
        flat, place = torch.empty(last - first, dtype=self.dtype, device=self.device), 0
        for piece in pieces:
            flat[place : place + len(piece)] = piece
            place += len(piece)
        return flat[start - first : stop - first].view(b - a, features)

    def _along_groups(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Elements start to stop, flat, where groups follow one another."""
        group = self.layer.meta["group_size"]
        scale, zero = self._scales()
        for lo, hi, codes in self._codes(start, stop, self._planes().size):
            these = slice(lo // group, hi // group)
            codes.view(-1, group).sub_(zero[these, None]).mul_(scale[these, None])
            yield codes

    def _across_groups(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """The same where element i is of group i modulo their number."""
        scale, zero = self._scales()
        groups = len(scale)
        for lo, hi, codes in self._codes(start, stop, groups):
            these = slice(lo % groups, lo % groups + hi - lo)
            yield codes.sub_(zero[these]).mul_(scale[these])

    def _codes(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """`(lo, hi, integers lo to hi)`, a copy in the compute dtype, cut at multiples of `step`, which divides a plane."""
        planes, words = self._planes(), self._words()
        lo = start
        while lo < stop:
            hi = min(stop, (lo // step + 1) * step)
            plane, offset = divmod(lo, planes.size)
            piece = words[offset : offset + hi - lo]
            if planes.count > 1:
                piece = (piece >> planes.shift(plane)) & ((1 << planes.bits) - 1)
            yield lo, hi, piece.to(self.dtype, copy=True)
            lo = hi


register(
    Format(
        "HQQ",
        HqqWeight,
        (".".join(_CLASS),),
        verified="CPU",
        remark="the norm by rows where groups end within one",
    )
)
