# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Layers built by hand to the documented tensor layouts of GPTQ, AWQ and HQQ, without their libraries, and the matrix
that each stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Layer(nn.Module):
    """A module that holds what it is given."""

    def __init__(self, shape: tuple[int, int], **held: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of the stream of bits that each column of `codes` [count, n] makes, the first integer lowest."""
    columns = []
    for column in codes.T.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(column))
        parts = [(stream >> shift) & 0xFFFFFFFF for shift in range(0, bits * len(column), 32)]
        columns.append([part - (1 << 32) if part >> 31 else part for part in parts])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def _draw(shape: tuple[int, int], bits: int, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Integers [out, in], zero points [out, groups] and scales [out, groups]."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, shape, generator=generator)
    zeros = torch.randint(1 << bits, (shape[0], groups), generator=generator)
    scales = 0.1 * torch.rand(shape[0], groups, generator=generator) + 0.01
    return codes, zeros, scales.to(dtype)


def gptq(
    shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype, act_order: bool = False
) -> tuple[nn.Module, torch.Tensor]:
    """A layer in GPTQ's layout and its matrix."""
    group = torch.arange(shape[1]) // group_size
    if act_order:
        group = group[torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))]
    codes, zeros, scales = _draw(shape, bits, int(group.max()) + 1, dtype)
    layer = Layer(
        shape, bits=bits, group_size=group_size, qweight=words(codes.T, bits),
        qzeros=words(zeros, bits).T.contiguous(), scales=scales.T.contiguous(), g_idx=group.int(),
    )  # fmt: skip
    return layer, scales[:, group] * (codes - zeros[:, group])


def awq(shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """A layer in AWQ's GEMM layout and its matrix."""
    group = torch.arange(shape[1]) // group_size
    codes, zeros, scales = _draw(shape, bits, int(group.max()) + 1, dtype)

    def along(values: torch.Tensor) -> torch.Tensor:  # values [out, n]
        if bits == 4:
            values = values.unflatten(0, (-1, 8))[:, AWQ_ORDER].flatten(0, 1)
        return words(values, bits).T.contiguous()

    layer = Layer(
        shape, bits=bits, group_size=group_size, qweight=along(codes), qzeros=along(zeros),
        scales=scales.T.contiguous(),
    )  # fmt: skip
    return layer, scales[:, group] * (codes - zeros[:, group])


_HQQ = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4), 1: ("1bit_u8", 8)}


def hqq(
    shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype, axis: int = 1
) -> tuple[nn.Module, torch.Tensor]:
    """A layer in HQQ's layout and its matrix."""
    groups = shape[0] * shape[1] // group_size
    lines = (groups, group_size) if axis == 1 else (group_size, groups)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, lines, generator=generator)
    size = (groups, 1) if axis == 1 else (1, groups)
    scale = (0.1 * torch.rand(size, generator=generator) + 0.01).to(dtype)
    zero = (((1 << bits) - 1) * torch.rand(size, generator=generator)).to(dtype)
    packing, count = _HQQ[bits]
    whole = torch.zeros(-(-lines[0] // count) * count, lines[1], dtype=torch.int64)
    whole[: lines[0]] = codes
    shifts = torch.arange((count - 1) * bits, -1, -bits)[:, None, None]
    stored = (whole.unflatten(0, (count, -1)) << shifts).sum(0).to(torch.int32 if bits == 3 else torch.uint8)
    meta = {
        "packing": packing, "group_size": group_size, "axis": axis, "scale": scale, "zero": zero, "quant_scale": False,
        "quant_zero": False, "view_as_float": False, "shape": torch.Size(shape), "unpack_view_dtype": stored.dtype,
    }  # fmt: skip
    layer = Layer(shape, W_q=stored, meta=meta, compute_dtype=dtype)
    return layer, ((codes.to(dtype) - zero) * scale).reshape(shape)
