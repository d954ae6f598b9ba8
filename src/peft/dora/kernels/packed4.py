# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""NF4 and FP4 bytes (Dettmers et al., arXiv 2305.14314): read inside other kernels, and unpacked in one launch with the
nested scales decoded on the way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel
from .tiles import ceil_div


@triton.jit
def load_scale4(absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_block, m_block, NESTED: tl.constexpr):
    """Float32 scales of the blocks `o_block`; NESTED is the number of blocks that share an outer scale, or 0."""
    b_absmax = tl.load(absmax_ptr + o_block, mask=m_block, other=0)
    if NESTED:
        b_value = tl.load(outer_code_ptr + b_absmax.to(tl.int32), mask=m_block, other=0.0)
        b_outer = tl.load(outer_ptr + o_block // NESTED, mask=m_block, other=0.0)
        b_absmax = b_value * b_outer + tl.load(offset_ptr)
    return b_absmax


# The dtypes that a weight is dequantised to; the products use it rounded so, and the norm has to be of what they use.
ROUNDINGS = {torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def round_to(b_x, ROUND: tl.constexpr):
    """A float32 block rounded to bfloat16 (1), to float16 (2) or not at all (0), and back."""
    if ROUND == 1:  # to nearest, ties to even, on the bits: the interpreter's bfloat16 is none
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        b_x = (b_bits & -65536).to(tl.float32, bitcast=True)
    if ROUND == 2:
        b_x = b_x.to(tl.float16).to(tl.float32)
    return b_x


@triton.jit
def load_weight4(
    data_ptr,
    absmax_ptr,
    code_ptr,
    outer_ptr,
    outer_code_ptr,
    offset_ptr,
    o_m,
    k,
    out_features,
    in_features,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile W[o_m, k : k + BLOCK_K] as it is dequantised, in float32.

    ROWS says where rows begin: between two blocks that share a scale (2), between two bytes (1), or anywhere (0). ROUND is
    the dtype's entry in ROUNDINGS. BLOCKSIZE and BLOCK_K are powers of two.
    """
    if ROWS > 0:
        o_half = k // 2 + tl.arange(0, BLOCK_K // 2)
        m_half = (o_m < out_features)[:, None] & (o_half < in_features // 2)[None, :]
        o_byte = o_m[:, None] * (in_features // 2) + o_half[None, :]  # [BLOCK_M, BLOCK_K / 2]
        b_byte = tl.load(data_ptr + o_byte, mask=m_half, other=0).to(tl.int32)
        if ROWS == 2:  # one scale for each block, not for each byte
            COUNT: tl.constexpr = BLOCK_K // BLOCKSIZE if BLOCK_K > BLOCKSIZE else 1
            o_first = k + tl.arange(0, COUNT) * BLOCKSIZE
            m_block = (o_m < out_features)[:, None] & (o_first < in_features)[None, :]
            o_block = (o_m[:, None] * in_features + o_first[None, :]) // BLOCKSIZE  # [BLOCK_M, COUNT]
            b_scale = load_scale4(absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_block, m_block, NESTED)
            if COUNT > 1:
                BLOCK_M: tl.constexpr = o_m.shape[0]
                b_scale = tl.broadcast_to(b_scale[:, :, None], [BLOCK_M, COUNT, BLOCKSIZE // 2])
                b_scale = tl.reshape(b_scale, [BLOCK_M, BLOCK_K // 2])
        else:
            b_scale = load_scale4(
                absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, (o_byte * 2) // BLOCKSIZE, m_half, NESTED
            )
        b_high = tl.load(code_ptr + (b_byte >> 4)) * b_scale
        b_low = tl.load(code_ptr + (b_byte & 15)) * b_scale
        return tl.interleave(round_to(b_high, ROUND), round_to(b_low, ROUND))
    o_k = k + tl.arange(0, BLOCK_K)
    m_w = (o_m < out_features)[:, None] & (o_k < in_features)[None, :]
    o_w = o_m[:, None] * in_features + o_k[None, :]  # [BLOCK_M, BLOCK_K]
    b_byte = tl.load(data_ptr + o_w // 2, mask=m_w, other=0).to(tl.int32)
    b_nibble = (b_byte >> ((1 - o_w % 2) * 4).to(tl.int32)) & 15
    b_scale = load_scale4(absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_w // BLOCKSIZE, m_w, NESTED)
    return round_to(tl.load(code_ptr + b_nibble) * b_scale, ROUND)


@triton.jit
def unpack4(
    data_ptr,
    absmax_ptr,
    code_ptr,
    outer_ptr,
    outer_code_ptr,
    offset_ptr,
    w_ptr,
    i,
    first,
    elements,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The i-th run of BLOCKS blocks of a weight, counted from its element `first`, where a block begins."""
    o_run = i.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    m_run = o_run * BLOCKSIZE < elements
    b_scale = load_scale4(
        absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, first // BLOCKSIZE + o_run, m_run, NESTED
    )  # [BLOCKS]
    o_byte = o_run[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    b_byte = tl.load(data_ptr + first // 2 + o_byte, mask=o_byte * 2 < elements, other=0).to(tl.int32)
    b_high = round_to(tl.load(code_ptr + (b_byte >> 4)) * b_scale[:, None], ROUND)  # [BLOCKS, BLOCKSIZE / 2]
    b_low = round_to(tl.load(code_ptr + (b_byte & 15)) * b_scale[:, None], ROUND)
    b_w = tl.interleave(b_high.to(w_ptr.dtype.element_ty), b_low.to(w_ptr.dtype.element_ty))
    o_w = o_run[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    tl.store(w_ptr + o_w, b_w, mask=o_w < elements)


@triton.jit
def dequantise4_kernel(
    data_ptr,
    absmax_ptr,
    code_ptr,
    outer_ptr,
    outer_code_ptr,
    offset_ptr,
    w_ptr,
    first,
    elements,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    i = tl.program_id(0)
    unpack4(
        data_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, w_ptr, i, first, elements,
        BLOCKSIZE, NESTED, ROUND, BLOCKS,
    )  # fmt: skip


_dequantise4 = Kernel(dequantise4_kernel)


def packed4_args(packed: Any) -> tuple[tuple, tuple[int, int]]:
    """The pointers (absmax, code, outer absmax, outer code, offset) and the constants (BLOCKSIZE, NESTED)."""
    if packed.nested is None:
        return (packed.absmax, packed.code, None, None, None), (packed.blocksize, 0)
    outer, outer_code, nested, offset = packed.nested
    return (packed.absmax, packed.code, outer, outer_code, offset), (packed.blocksize, nested)


def rounding_of(packed: Any, dtype: torch.dtype) -> int:
    """ROUND of a weight that is unpacked in `dtype`: it is rounded to the dtype that was quantised, if that is another."""
    return 0 if packed.dtype == dtype else ROUNDINGS.get(packed.dtype, 0)


def dequantise_packed4(
    packed: Any, dtype: torch.dtype, launches: dict | None = None, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """The matrix `[out, in]` of NF4 or FP4 bytes: code times scale, rounded to the dtype that was quantised, in `dtype`.

    Args:
        packed: The bytes.
        dtype: That of the matrix.
        launches: Where the launches are kept.
        rows: The first row, before which there are whole blocks, and the one after the last; None for all.
    """
    first, last = (0, packed.shape[0]) if rows is None else rows
    w = torch.empty((last - first, packed.shape[1]), dtype=dtype, device=packed.data.device)
    pointers, constants = packed4_args(packed)
    key = "dequantise", rows
    launch = None if launches is None else launches.get(key)
    if launch is None:
        blocks = max(1, (32 if INTERPRETED else 2048) // packed.blocksize)
        launch = _dequantise4.prepare(
            (ceil_div(w.numel(), blocks * packed.blocksize), 1, 1),
            (first * packed.shape[1], w.numel()),
            (*constants, rounding_of(packed, dtype), blocks),
            2,
            # The nested scale is a product and a sum, each rounded, in bitsandbytes: fused it would round once.
            fusion=False,
            keep=(launches, key),
        )
    launch(packed.data, *pointers, w)
    return w
