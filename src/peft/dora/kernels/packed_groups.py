# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Few-bit integers in groups with one scale and one zero point, w = (q − z)·s, as GPTQ, AWQ and HQQ store them: read
inside other kernels, and unpacked in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel
from .packed4 import ROUNDINGS, round_to
from .tiles import ceil_div

# How the integers lie. GPTQ: in streams of int32 words down the inputs; AWQ: in streams along the outputs, INTERLEAVED:
# eight 4-bit ones of it in the order 0, 2, 4, 6, 1, 3, 5, 7; HQQ: rows a fraction of the matrix apart share a word.
GPTQ, AWQ, INTERLEAVED, HQQ_ALONG, HQQ_ACROSS = 32, 33, 34, 40, 41


@triton.jit
def load_code(p_stream, o_place, stride, m, BITS: tl.constexpr):
    """The integers at places `o_place` of streams of bits whose words are `stride` apart, as int32."""
    o_bit = o_place * BITS
    o_shift = o_bit % 32
    p_word = p_stream + (o_bit // 32) * stride
    b_code = tl.load(p_word, mask=m, other=0).to(tl.uint32, bitcast=True) >> o_shift
    if 32 % BITS != 0:
        b_next = tl.load(p_word + stride, mask=m & (o_shift + BITS > 32), other=0).to(tl.uint32, bitcast=True)
        b_code |= b_next << ((32 - o_shift) % 32)
    return (b_code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def load_weight_groups(
    words_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    o_m,
    k,
    out_features,
    in_features,
    plane_rows,
    cycle_rows,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile W[o_m, k : k + BLOCK_K] as it is dequantised, in float32.

    Zero points are numbers, one a scale, for HQQ, else integers in streams along the outputs; `group_ptr` has the group of
    each input, or is None where GROUP neighbours make one. HQQ's rows lie in COUNT planes of `plane_rows` rows; after
    `cycle_rows` of them HQQ_ACROSS starts with the first group. Difference and product are each rounded to ROUND.
    """
    o_k = k + tl.arange(0, BLOCK_K)
    m_w = (o_m < out_features)[:, None] & (o_k < in_features)[None, :]  # [BLOCK_M, BLOCK_K]
    if LAYOUT >= 40:
        o_word = (o_m % plane_rows)[:, None] * in_features + o_k[None, :]
        o_shift = ((COUNT - 1 - o_m // plane_rows) * BITS).to(tl.int32)
        b_word = tl.load(words_ptr + o_word, mask=m_w, other=0).to(tl.int32)
        b_code = (b_word >> o_shift[:, None]) & ((1 << BITS) - 1)
        if LAYOUT == 40:
            o_group = o_m[:, None] * (in_features // GROUP) + (o_k // GROUP)[None, :]
        else:
            o_group = (o_m % cycle_rows)[:, None] * in_features + o_k[None, :]
        b_zero = tl.load(zero_ptr + o_group, mask=m_w, other=0.0).to(tl.float32)
        b_scale = tl.load(scale_ptr + o_group, mask=m_w, other=0.0).to(tl.float32)
    else:
        o_row = (out_features * BITS + 31) // 32  # words in a stream along the outputs
        o_place = o_m
        if LAYOUT == 34:
            o_place = o_m // 8 * 8 + (o_m % 2) * 4 + o_m % 8 // 2
        if LAYOUT == 32:
            b_code = load_code(words_ptr + o_m[:, None], o_k[None, :], out_features, m_w, BITS)
        else:
            p_stream = words_ptr + o_k[None, :].to(tl.int64) * o_row
            b_code = load_code(p_stream, o_place[:, None], 1, m_w, BITS)
        if group_ptr is not None:
            o_group = tl.load(group_ptr + o_k, mask=o_k < in_features, other=0)
        else:
            o_group = o_k // GROUP
        b_zero = load_code(zero_ptr + o_group[None, :] * o_row, o_place[:, None], 1, m_w, BITS).to(tl.float32)
        p_scale = scale_ptr + o_group[None, :] * out_features + o_m[:, None]
        b_scale = tl.load(p_scale, mask=m_w, other=0.0).to(tl.float32)
    return round_to(round_to(b_code.to(tl.float32) - b_zero, ROUND) * b_scale, ROUND)


@triton.jit
def dequantise_groups_kernel(
    words_ptr, scale_ptr, zero_ptr, group_ptr, w_ptr, out_features, in_features, plane_rows, cycle_rows,
    LAYOUT: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K
    b_w = load_weight_groups(
        words_ptr, scale_ptr, zero_ptr, group_ptr, o_m, k, out_features, in_features, plane_rows, cycle_rows,
        LAYOUT, GROUP, BITS, COUNT, ROUND, BLOCK_K,
    )  # fmt: skip
    o_k = k + tl.arange(0, BLOCK_K)
    p_w = w_ptr + o_m[:, None] * in_features + o_k[None, :]
    m_w = (o_m < out_features)[:, None] & (o_k < in_features)[None, :]
    tl.store(p_w, b_w.to(w_ptr.dtype.element_ty), mask=m_w)


_dequantise_groups = Kernel(dequantise_groups_kernel)


class GroupArgs(NamedTuple):
    """Grouped integers as the kernels take them.

    Args:
        pointers: Words, scales, zero points, and the group of each input or None.
        sizes: plane_rows and cycle_rows, 1 where there is no such thing.
        constants: LAYOUT, GROUP, BITS, COUNT, ROUND.
    """

    pointers: tuple
    sizes: tuple[int, int]
    constants: tuple[int, int, int, int, int]


def group_args(packed: Any) -> GroupArgs:
    """What the kernels need of a `peft.weights.Packed` of kind "gptq", "awq" or "hqq"."""
    layout = {"gptq": GPTQ, "awq": INTERLEAVED if packed.bits == 4 else AWQ}.get(packed.kind)
    sizes, count = (1, 1), 1
    if layout is None:
        layout = HQQ_ALONG if packed.cycle_rows is None else HQQ_ACROSS
        sizes = packed.plane_rows, packed.cycle_rows or 1
        count = packed.planes
    constants = layout, packed.blocksize or 0, packed.bits, count, ROUNDINGS.get(packed.dtype, 0)
    return GroupArgs((packed.data, packed.scales, packed.zeros, packed.groups), sizes, constants)


def dequantise_groups(packed: Any, dtype: torch.dtype) -> torch.Tensor:
    """The matrix `[out, in]` of grouped integers: rounded as the library that stored them does, in `dtype`."""
    out_features, in_features = packed.shape
    w = torch.empty(packed.shape, dtype=dtype, device=packed.data.device)
    args = group_args(packed)
    block_m, block_k = (16, 32) if INTERPRETED else (32, 64)
    _dequantise_groups(
        (ceil_div(out_features, block_m), ceil_div(in_features, block_k), 1),
        (*args.pointers, w),
        (out_features, in_features, *args.sizes),
        (*args.constants, block_m, block_k),
    )
    return w
