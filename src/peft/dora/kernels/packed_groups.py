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
def repeat_columns(b_x, COUNT: tl.constexpr):
    """Each column COUNT times: [M, N] to [M, N * COUNT]."""
    b_y = tl.broadcast_to(b_x[:, :, None], (b_x.shape[0], b_x.shape[1], COUNT))
    return tl.reshape(b_y, (b_x.shape[0], b_x.shape[1] * COUNT))


@triton.jit
def load_codes_down(words_ptr, o_m, k, out_features, in_features, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """GPTQ's integers [BLOCK_M, BLOCK_K] as int32, each word loaded once where it holds a whole number of them."""
    o_k = k + tl.arange(0, BLOCK_K)
    if 32 % BITS == 0:
        COUNT: tl.constexpr = 32 // BITS
        o_word = k // COUNT + tl.arange(0, BLOCK_K // COUNT)
        m_word = (o_m < out_features)[:, None] & (o_word * COUNT < in_features)[None, :]
        p_word = words_ptr + o_word[None, :].to(tl.int64) * out_features + o_m[:, None]
        b_word = repeat_columns(tl.load(p_word, mask=m_word, other=0), COUNT)  # [BLOCK_M, BLOCK_K]
        b_code = (b_word >> ((o_k % COUNT) * BITS)[None, :]) & ((1 << BITS) - 1)
    else:
        m_w = (o_m < out_features)[:, None] & (o_k < in_features)[None, :]
        b_code = load_code(words_ptr + o_m[:, None], o_k[None, :], out_features, m_w, BITS)
    return b_code


@triton.jit
def repeat_rows(b_x, COUNT: tl.constexpr):
    """Each row COUNT times: [M, N] to [M * COUNT, N]."""
    b_y = tl.broadcast_to(b_x[:, None, :], (b_x.shape[0], COUNT, b_x.shape[1]))
    return tl.reshape(b_y, (b_x.shape[0] * COUNT, b_x.shape[1]))


@triton.jit
def load_codes_along(
    words_ptr, o_m, o_place, k, out_features, in_features, BITS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """AWQ's integers [BLOCK_M, BLOCK_K] as int32, each word loaded once where it holds a whole number of them: rows `o_m`
    begin with the first of a word, and `o_place`, where they lie, permutes within words."""
    o_k = k + tl.arange(0, BLOCK_K)
    p_stream = words_ptr + o_k[None, :].to(tl.int64) * ((out_features * BITS + 31) // 32)
    if 32 % BITS == 0:
        COUNT: tl.constexpr = 32 // BITS
        o_word = tl.max(tl.reshape(o_m, (o_m.shape[0] // COUNT, COUNT)), 1) // COUNT  # [BLOCK_M / COUNT]
        m_word = (o_word * COUNT < out_features)[:, None] & (o_k < in_features)[None, :]
        b_word = repeat_rows(tl.load(p_stream + o_word[:, None], mask=m_word, other=0), COUNT)  # [BLOCK_M, BLOCK_K]
        b_code = (b_word >> (o_place % COUNT * BITS).to(tl.int32)[:, None]) & ((1 << BITS) - 1)
    else:
        m_w = (o_m < out_features)[:, None] & (o_k < in_features)[None, :]
        b_code = load_code(p_stream, o_place[:, None], 1, m_w, BITS)
    return b_code


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
    `cycle_rows` of them HQQ_ACROSS starts with the first group. Difference and product are each rounded to ROUND. k is a
    multiple of BLOCK_K: where no group of neighbours crosses a tile's border, their scale is loaded once.
    """
    ALIGNED: tl.constexpr = GROUP > 0 and (GROUP % BLOCK_K == 0 or BLOCK_K % GROUP == 0)
    EACH: tl.constexpr = (
        (GROUP if GROUP < BLOCK_K else BLOCK_K) if ALIGNED else 1
    )  # columns of a tile that share a scale
    o_k = k + tl.arange(0, BLOCK_K)
    o_s = k + tl.arange(0, BLOCK_K // EACH) * EACH
    m_m = (o_m < out_features)[:, None]
    m_s = m_m & (o_s < in_features)[None, :]  # [BLOCK_M, BLOCK_K / EACH]
    if LAYOUT >= 40:
        o_word = (o_m % plane_rows)[:, None] * in_features + o_k[None, :]
        o_shift = ((COUNT - 1 - o_m // plane_rows) * BITS).to(tl.int32)
        b_word = tl.load(words_ptr + o_word, mask=m_m & (o_k < in_features)[None, :], other=0).to(tl.int32)
        b_code = (b_word >> o_shift[:, None]) & ((1 << BITS) - 1)
        if LAYOUT == 40:
            o_group = o_m[:, None] * (in_features // GROUP) + (o_s // GROUP)[None, :]
        else:
            o_group = (o_m % cycle_rows)[:, None] * in_features + o_s[None, :]
        b_zero = tl.load(zero_ptr + o_group, mask=m_s, other=0.0).to(tl.float32)
        b_scale = tl.load(scale_ptr + o_group, mask=m_s, other=0.0).to(tl.float32)
    else:
        o_row = (out_features * BITS + 31) // 32  # words in a stream along the outputs
        o_place = o_m
        if LAYOUT == 34:
            o_place = o_m // 8 * 8 + (o_m % 2) * 4 + o_m % 8 // 2
        if LAYOUT == 32:
            b_code = load_codes_down(words_ptr, o_m, k, out_features, in_features, BITS, BLOCK_K)
        else:
            b_code = load_codes_along(words_ptr, o_m, o_place, k, out_features, in_features, BITS, BLOCK_K)
        if group_ptr is not None:
            o_group = tl.load(group_ptr + o_s, mask=o_s < in_features, other=0)
        else:
            o_group = o_s // GROUP
        b_zero = load_code(zero_ptr + o_group[None, :] * o_row, o_place[:, None], 1, m_s, BITS).to(tl.float32)
        p_scale = scale_ptr + o_group[None, :] * out_features + o_m[:, None]
        b_scale = tl.load(p_scale, mask=m_s, other=0.0).to(tl.float32)
    if EACH > 1 and EACH < BLOCK_K:
        b_zero, b_scale = repeat_columns(b_zero, EACH), repeat_columns(b_scale, EACH)
    return round_to(round_to(b_code.to(tl.float32) - b_zero, ROUND) * b_scale, ROUND)


@triton.jit
def dequantise_groups_kernel(
    words_ptr, scale_ptr, zero_ptr, group_ptr, w_ptr, first, last, out_features, in_features, plane_rows, cycle_rows,
    LAYOUT: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_m = first + tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K
    b_w = load_weight_groups(
        words_ptr, scale_ptr, zero_ptr, group_ptr, o_m, k, out_features, in_features, plane_rows, cycle_rows,
        LAYOUT, GROUP, BITS, COUNT, ROUND, BLOCK_K,
    )  # fmt: skip
    o_k = k + tl.arange(0, BLOCK_K)
    p_w = w_ptr + (o_m - first)[:, None] * in_features + o_k[None, :]
    m_w = (o_m < last)[:, None] & (o_k < in_features)[None, :]
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


def dequantise_groups(
    packed: Any, dtype: torch.dtype, launches: dict | None = None, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """The matrix `[out, in]` of grouped integers: rounded as the library that stored them does, in `dtype`.

    Args:
        packed: The integers.
        dtype: That of the matrix.
        launches: Where the launches are kept.
        rows: The first row and the one after the last; None for all.
    """
    first, last = (0, packed.shape[0]) if rows is None else rows
    w = torch.empty((last - first, packed.shape[1]), dtype=dtype, device=packed.data.device)
    pointers = packed.data, packed.scales, packed.zeros, packed.groups
    key = "dequantise", rows, packed.scales.dtype, packed.blocksize  # None where the groups are in any order
    launch = None if launches is None else launches.get(key)
    if launch is None:
        args = group_args(packed)
        block_m, block_k = (16, 32) if INTERPRETED else (64, 64)
        launch = _dequantise_groups.prepare(
            (ceil_div(w.shape[0], block_m), ceil_div(w.shape[1], block_k), 1),
            (first, last, *packed.shape, *args.sizes),
            (*args.constants, block_m, block_k),
            keep=(launches, key),
        )
    launch(*pointers, w)
    return w
