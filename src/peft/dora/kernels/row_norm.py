# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""‖W + s·BA‖ by rows, from a plain or a packed W: the product is formed tile by tile and never leaves the registers."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .packed4 import ROUNDINGS, load_weight4, packed4_args
from .packed8 import load_weight8
from .packed_groups import group_args, load_weight_groups

PLAIN, FOUR_BIT, EIGHT_BIT = 0, 4, 8  # and the layouts of packed_groups
GROUPED = ("gptq", "awq", "hqq")


@triton.jit
def sum_squares(
    w_ptr, scale_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, zero_ptr, group_ptr, a_ptr, b_ptr, o_m, scaling,
    out_features, in_features, size_m, size_k,
    FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Σ_k (W + s·BA)[o_m, k]² in float32."""
    m_m = o_m < out_features
    o_r = tl.arange(0, BLOCK_R)
    p_b = b_ptr + o_m[:, None] * RANK + o_r[None, :]
    if RANK <= BLOCK_R:
        b_b = tl.load(p_b, mask=m_m[:, None] & (o_r < RANK)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
    b_squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for k in tl.range(0, in_features, BLOCK_K, num_stages=STAGES, flatten=STAGES is not None):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < in_features
        p_a = a_ptr + o_k[None, :]
        b_delta = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        if RANK <= BLOCK_R:
            o_a = o_r[:, None].to(tl.int64) * in_features
            b_a = tl.load(p_a + o_a, mask=(o_r < RANK)[:, None] & m_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
            b_delta = tl.dot(b_b, b_a, b_delta, input_precision="ieee")
        else:
            for r in range(0, RANK, BLOCK_R):
                m_r = r + o_r < RANK
                o_a = (r + o_r)[:, None].to(tl.int64) * in_features
                b_a = tl.load(p_a + o_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
                b_br = tl.load(p_b + r, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
                b_delta = tl.dot(b_br, b_a, b_delta, input_precision="ieee")
        if FORMAT == 4:
            b_w = load_weight4(
                w_ptr, scale_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_m, k, out_features, in_features,
                BLOCKSIZE, NESTED, ROWS, ROUND, BLOCK_K,
            )  # fmt: skip
        elif FORMAT == 8:
            b_w = load_weight8(w_ptr, scale_ptr, o_m, k, out_features, in_features, BLOCK_K)
        elif FORMAT >= 32:
            b_w = load_weight_groups(
                w_ptr, scale_ptr, zero_ptr, group_ptr, o_m, k, out_features, in_features, size_m, size_k,
                FORMAT, BLOCKSIZE, BITS, COUNT, ROUND, BLOCK_K,
            )  # fmt: skip
        else:
            p_w = w_ptr + o_m[:, None] * size_m + o_k[None, :].to(tl.int64) * size_k
            b_w = tl.load(p_w, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_sum = tl.where(m_k[None, :], b_w + scaling * b_delta, 0.0)  # [BLOCK_M, BLOCK_K]
        b_squares += b_sum * b_sum
    return tl.sum(b_squares, 1)


class Source(NamedTuple):
    """A weight as the kernel takes it.

    Args:
        pointers: Its data and what its scales need: scale, code, outer scale, outer code, offset, zero point, group.
        sizes: Elements from row to row and from column to column, of plain weights; plane_rows and cycle_rows of HQQ's.
        constants: FORMAT, BLOCKSIZE, NESTED, ROWS, BITS, COUNT, ROUND.
    """

    pointers: tuple
    sizes: tuple[int, int]
    constants: tuple[int, int, int, int, int, int, int]


def source_of(weight: Any, packed: Any) -> Source | None:
    """How the kernel reads a weight; None where it cannot.

    Args:
        weight: A `peft.weights.BaseWeight`.
        packed: What its `packed()` gave.
    """
    if packed is None:
        if weight.format != "plain":
            return None
        matrix = weight.dense()
        return Source((matrix, *[None] * 7), matrix.stride(), (PLAIN, 0, 0, 0, 0, 0, 0))
    if packed.kind == "int8":
        return Source((packed.data, packed.scb, *[None] * 6), (0, 0), (EIGHT_BIT, 0, 0, 0, 0, 0, 0))
    if packed.kind in GROUPED:
        (words, scales, zeros, groups), sizes, (layout, *rest) = group_args(packed)
        size, bits, count, rounding = rest
        constants = layout, size, 0, 0, bits, count, rounding
        return Source((words, scales, *[None] * 4, zeros, groups), sizes, constants)
    scales, (blocksize, nested) = packed4_args(packed)
    in_features = packed.shape[1]
    rows = 2 if in_features % blocksize == 0 else 1 if in_features % 2 == 0 else 0
    constants = (FOUR_BIT, blocksize, nested, rows, 0, 0, ROUNDINGS.get(packed.dtype, 0))
    return Source((packed.data, *scales, None, None), (0, 0), constants)
