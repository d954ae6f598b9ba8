# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""‖W + s·BA‖ by rows, from a plain or a packed W: the product is formed tile by tile and never leaves the registers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Kernel
from .packed4 import ROUNDINGS, load_weight4, packed4_args
from .packed8 import load_weight8
from .packed_groups import group_args, load_weight_groups
from .tiles import ceil_div, rank_block
from .tuning import NormTiles, choose

PLAIN, FOUR_BIT, EIGHT_BIT = 0, 4, 8  # and the layouts of packed_groups
GROUPED = ("gptq", "awq", "hqq")


@triton.jit
def sum_squares(
    w_ptr, scale_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, zero_ptr, group_ptr, a_ptr, b_ptr, o_m, scaling,
    out_features, in_features, size_m, size_k,
    FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, EVEN: tl.constexpr,
    BITS: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_k (W + s·BA)[o_m, k]² in float32."""
    m_m = o_m < out_features
    o_r = tl.arange(0, BLOCK_R)
    p_b = b_ptr + o_m[:, None] * RANK + o_r[None, :]
    if RANK <= BLOCK_R:
        b_b = tl.load(p_b, mask=m_m[:, None] & (o_r < RANK)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
    b_squares = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
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
                BLOCKSIZE, NESTED, EVEN, ROUND, BLOCK_K,
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


@triton.jit(do_not_specialize=["epoch"])
def row_norm_fwd_kernel(
    w_ptr, scale_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, zero_ptr, group_ptr, a_ptr, b_ptr,
    old_ptr, stats_ptr, magnitude_ptr, changed_ptr, epoch, scaling, floor,
    out_features, in_features, size_m, size_k,
    FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, EVEN: tl.constexpr,
    BITS: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < out_features
    # The old norm stands unless the factors changed at this very pass.
    b_norm = tl.zeros([BLOCK_M], dtype=tl.float32)
    stale = True
    if changed_ptr is not None:
        stale = tl.load(changed_ptr) == epoch
        b_norm = tl.load(old_ptr + o_m, mask=m_m, other=0.0)
    if stale:
        b_norm = tl.sqrt_rn(
            sum_squares(
                w_ptr, scale_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, zero_ptr, group_ptr, a_ptr, b_ptr,
                o_m, scaling, out_features, in_features, size_m, size_k,
                FORMAT, BLOCKSIZE, NESTED, EVEN, BITS, COUNT, ROUND, RANK, BLOCK_M, BLOCK_K, BLOCK_R,
            )
        )  # fmt: skip
    tl.store(stats_ptr + o_m, b_norm, mask=m_m)
    if magnitude_ptr is not None:
        b_m = tl.load(magnitude_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)
        b_gain = tl.where(b_norm == 0, 1.0, tl.div_rn(b_m, tl.where(b_norm == 0, 1.0, b_norm)))
        b_gain = tl.where(tl.abs(b_gain) < floor, floor, b_gain)
        tl.store(stats_ptr + out_features + o_m, b_gain, mask=m_m)


_row_norm_fwd = Kernel(row_norm_fwd_kernel, free=1)


class Source(NamedTuple):
    """A weight as the kernel takes it.

    Args:
        pointers: Its data and what its scales need: scale, code, outer scale, outer code, offset, zero point, group.
        sizes: Elements from row to row and from column to column, of plain weights; plane_rows and cycle_rows of HQQ's.
        constants: FORMAT, BLOCKSIZE, NESTED, EVEN, BITS, COUNT, ROUND.
    """

    pointers: tuple
    sizes: tuple[int, int]
    constants: tuple[int, int, int, bool, int, int, int]


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
        return Source((matrix, *[None] * 7), matrix.stride(), (PLAIN, 0, 0, False, 0, 0, 0))
    if packed.kind == "int8":
        return Source((packed.data, packed.scb, *[None] * 6), (0, 0), (EIGHT_BIT, 0, 0, False, 0, 0, 0))
    if packed.kind in GROUPED:
        (words, scales, zeros, groups), sizes, (layout, *rest) = group_args(packed)
        size, bits, count, rounding = rest
        constants = layout, size, 0, False, bits, count, rounding
        return Source((words, scales, *[None] * 4, zeros, groups), sizes, constants)
    scales, (blocksize, nested) = packed4_args(packed)
    constants = (FOUR_BIT, blocksize, nested, packed.shape[1] % 2 == 0, 0, 0, ROUNDINGS.get(packed.dtype, 0))
    return Source((packed.data, *scales, None, None), (0, 0), constants)


def launch_row_norm(
    source: Source,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    stats: torch.Tensor,
    *,
    old: torch.Tensor | None = None,
    changed: torch.Tensor | None = None,
    epoch: int = 0,
    magnitude: torch.Tensor | None = None,
    floor: float = 0.0,
) -> None:
    """Write the norm, and the gain where a magnitude is given; where `changed` does not hold `epoch`, the old norm.

    Args:
        source: The weight.
        a, b: `[r, in]` and `[out, r]`, contiguous, in one dtype.
        scaling: s.
        stats: `[1, out]` float32, or `[2, out]` with the gain; written.
        old: The stats whose norm stands while nothing changed.
        changed: int32, the last pass at which the factors changed; None to compute the norm in any case.
        epoch: This pass.
        magnitude: m `[out]`.
        floor: Lift gains smaller than this to it.
    """
    out_features, in_features = b.shape[0], a.shape[1]
    rank = a.shape[0]
    if not out_features:
        return
    block_r = rank_block(rank)

    def run(tiles: NormTiles, changed: torch.Tensor | None = None) -> None:
        _row_norm_fwd(
            (ceil_div(out_features, tiles.block_m), 1, 1),
            (*source.pointers, a, b, old, stats, magnitude, changed),
            (epoch, float(scaling), floor, out_features, in_features, *source.sizes),
            (*source.constants, rank, tiles.block_m, tiles.block_k, block_r),
            tiles.warps,
            tiles.stages,
        )

    data = source.pointers[0]
    kind = (a.device.index, data.dtype, a.dtype, source.constants, source.sizes[0] == 1)
    run(choose(kind, out_features, in_features, rank, a.element_size(), run), changed)


def row_norm(source: Source, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The Triton body of `peft.dora.row_norm`, in one launch.

    Args:
        source: The base weight `[out, in]`.
        a, b: `[r, in]` and `[out, r]` in one dtype.
        scaling: s.

    Returns:
        `[out]` float32.
    """
    stats = torch.empty((1, b.shape[0]), dtype=torch.float32, device=a.device)
    launch_row_norm(source, a.contiguous(), b.contiguous(), scaling, stats)
    return stats[0]
