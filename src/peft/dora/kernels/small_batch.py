# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The forward pass of a layer for a few tokens, in one launch: W is read once, plain or in 4 bits, and what the adapter adds
is made beside it. A decoded token costs what reading its weights costs; everything else is launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel
from .packed4 import load_scale4, packed4_args, round_to, rounding_of
from .tiles import ceil_div, power_of_two, rank_block

# One block of rows of the tensor cores: from the next row on they would be multiplied twice, and cuBLAS, which has more
# rows to a weight, reads no more than this kernel does.
MOST_TOKENS = 16
FOLDED_RANK = 32  # up to here every program makes x Aᵀ itself: A comes from the L2 cache, and a launch is saved


@triton.jit(do_not_specialize=["tokens"])
def small_batch_fwd_kernel(
    x_ptr, w_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, a_ptr, h_ptr, b_ptr, stats_ptr,
    bias_ptr, lora_bias_ptr, y_ptr,
    tokens, scaling, out_features, in_features, stride_wn,
    PACKED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROUND: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < out_features
    o_r = tl.arange(0, BLOCK_R)
    if BLOCK_M == 1:
        b_v, b_h = one_row(
            x_ptr, w_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, a_ptr, o_n, in_features,
            stride_wn, m_n, PACKED, BLOCKSIZE, NESTED, ROUND, RANK, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        b_low = tl.zeros([BLOCK_N], dtype=tl.float32)
        for r in range(0, RANK, BLOCK_R):
            if h_ptr is not None:
                b_h = tl.load(h_ptr + r + o_r, mask=r + o_r < RANK, other=0.0).to(tl.float32)
            p_b = b_ptr + o_n[:, None].to(tl.int64) * RANK + r + o_r[None, :]
            b_b = tl.load(p_b, mask=m_n[:, None] & (r + o_r < RANK)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
            b_low += tl.sum(b_b.to(tl.float32) * b_h[None, :], 1)
        p_y = y_ptr + o_n
        m_y = m_n
    else:
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < tokens
        b_v, b_h = few_rows(
            x_ptr, w_ptr, a_ptr, o_m, m_m, o_n, m_n, in_features, stride_wn, RANK, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R
        )  # fmt: skip
        b_low = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for r in range(0, RANK, BLOCK_R):
            if h_ptr is not None:
                p_h = h_ptr + o_m[:, None] * RANK + r + o_r[None, :]
                b_h = tl.load(p_h, mask=m_m[:, None] & (r + o_r < RANK)[None, :], other=0.0).to(tl.float32)
            p_b = b_ptr + o_n[None, :].to(tl.int64) * RANK + r + o_r[:, None]
            b_b = tl.load(p_b, mask=m_n[None, :] & (r + o_r < RANK)[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
            b_low = tl.dot(b_h, b_b.to(tl.float32), b_low, input_precision="ieee")
        p_y = y_ptr + o_m[:, None] * out_features + o_n[None, :]
        m_y = m_m[:, None] & m_n[None, :]
    if lora_bias_ptr is not None:
        b_low += along(tl.load(lora_bias_ptr + o_n, mask=m_n, other=0.0), BLOCK_M)
    b_v += scaling * b_low
    if stats_ptr is not None:
        b_v *= along(tl.load(stats_ptr + out_features + o_n, mask=m_n, other=0.0), BLOCK_M)
    if bias_ptr is not None:
        b_v += along(tl.load(bias_ptr + o_n, mask=m_n, other=0.0), BLOCK_M)
    tl.store(p_y, b_v.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit
def along(b_vector, BLOCK_M: tl.constexpr):
    """A vector [BLOCK_N] in float32, as it is for one row and to be added to each of several."""
    b_vector = b_vector.to(tl.float32)
    if BLOCK_M > 1:
        b_vector = b_vector[None, :]
    return b_vector


@triton.jit
def load_pair4(
    w_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_n, m_n, k, in_features, TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROUND: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The even and the odd columns of W[o_n, k : k + 2 * BLOCKS * HALF] in TYPE, each [BLOCK_N, BLOCKS, HALF].

    No block of scales spans two rows, and 2 * HALF columns have one scale.
    """
    o_block = k + tl.arange(0, BLOCKS) * (2 * HALF)  # [BLOCKS]
    m_block = m_n[:, None] & (o_block < in_features)[None, :]
    o_first = o_n[:, None].to(tl.int64) * in_features + o_block[None, :]  # [BLOCK_N, BLOCKS]
    o_byte = (o_first // 2)[:, :, None] + tl.arange(0, HALF)[None, None, :]
    b_byte = tl.load(w_ptr + o_byte, mask=m_block[:, :, None], other=0).to(tl.int32)
    b_scale = load_scale4(
        absmax_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_first // BLOCKSIZE, m_block, NESTED
    )[:, :, None]  # fmt: skip
    b_even = round_to(tl.load(code_ptr + (b_byte >> 4)) * b_scale, ROUND).to(TYPE)
    b_odd = round_to(tl.load(code_ptr + (b_byte & 15)) * b_scale, ROUND).to(TYPE)
    return b_even, b_odd


@triton.jit
def one_row(
    x_ptr, w_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, a_ptr, o_n, in_features, stride_wn, m_n,
    PACKED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROUND: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """W x [BLOCK_N] and, where A is given, A x [BLOCK_R] of one row x, without tensor cores: sums are lane by lane."""
    o_r = tl.arange(0, BLOCK_R)
    b_hs = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    if PACKED:
        HALF: tl.constexpr = (BLOCKSIZE if BLOCKSIZE < BLOCK_K else BLOCK_K) // 2
        BLOCKS: tl.constexpr = BLOCK_K // (2 * HALF)
        b_vs = tl.zeros([BLOCK_N, BLOCKS, HALF], dtype=tl.float32)
        o_even = tl.arange(0, BLOCKS)[:, None] * (2 * HALF) + 2 * tl.arange(0, HALF)[None, :]
    else:
        b_vs = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < in_features
        b_x = tl.load(x_ptr + o_k, mask=m_k, other=0.0).to(tl.float32)  # [BLOCK_K]
        if PACKED:
            b_even, b_odd = load_pair4(
                w_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, o_n, m_n, k, in_features,
                x_ptr.dtype.element_ty, BLOCKSIZE, NESTED, ROUND, BLOCKS, HALF,
            )  # fmt: skip
            m_x = k + o_even < in_features
            b_x_even = tl.load(x_ptr + k + o_even, mask=m_x, other=0.0).to(tl.float32)  # [BLOCKS, HALF]
            b_x_odd = tl.load(x_ptr + k + 1 + o_even, mask=m_x, other=0.0).to(tl.float32)
            b_vs += b_even.to(tl.float32) * b_x_even[None, :, :] + b_odd.to(tl.float32) * b_x_odd[None, :, :]
        else:
            p_w = w_ptr + o_n[:, None].to(tl.int64) * stride_wn + o_k[None, :]
            b_w = tl.load(p_w, mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
            b_vs += b_w.to(tl.float32) * b_x[None, :]
        if a_ptr is not None:
            p_a = a_ptr + o_r[:, None].to(tl.int64) * in_features + o_k[None, :]
            b_a = tl.load(p_a, mask=(o_r < RANK)[:, None] & m_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
            b_hs += b_a.to(tl.float32) * b_x[None, :]
    if PACKED:
        b_v = tl.sum(tl.sum(b_vs, 2), 1)
    else:
        b_v = tl.sum(b_vs, 1)
    return b_v, tl.sum(b_hs, 1)


@triton.jit
def few_rows(
    x_ptr, w_ptr, a_ptr, o_m, m_m, o_n, m_n, in_features, stride_wn,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x Wᵀ [BLOCK_M, BLOCK_N] and, where A is given, x Aᵀ [BLOCK_M, BLOCK_R], by tensor cores."""
    o_r = tl.arange(0, BLOCK_R)
    b_v = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_h = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < in_features
        p_x = x_ptr + o_m[:, None] * in_features + o_k[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        p_w = w_ptr + o_n[None, :].to(tl.int64) * stride_wn + o_k[:, None]
        b_w = tl.load(p_w, mask=m_n[None, :] & m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_v = tl.dot(b_x, b_w, b_v, input_precision="ieee")
        if a_ptr is not None:
            p_a = a_ptr + o_r[None, :].to(tl.int64) * in_features + o_k[:, None]
            b_a = tl.load(p_a, mask=(o_r < RANK)[None, :] & m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
            b_h = tl.dot(b_x.to(a_ptr.dtype.element_ty), b_a, b_h, input_precision="ieee")
    return b_v, b_h


_small_batch_fwd = Kernel(small_batch_fwd_kernel)


class SmallTiles(NamedTuple):
    """BLOCK_M, BLOCK_N, BLOCK_K, the number of warps and of stages, and whether each program makes x Aᵀ itself."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    fold: bool


def small_batch_tiles(tokens: int, out_features: int, rank: int, packed: bool) -> SmallTiles:
    """Tiles by what is read: enough programs for two waves on 132 multiprocessors, each with 8 KiB a step on its way.

    One row needs no tensor cores, and so no layout of theirs either.
    """
    fold = rank <= FOLDED_RANK
    if INTERPRETED:
        return SmallTiles(1 if tokens == 1 else 16, 16, 64, 1, 1, fold)
    block_n = 16 if out_features > 2048 else 8
    if tokens == 1:
        return SmallTiles(1, block_n, 512 if packed else 256, 4, 3, fold)
    if out_features > 8192:
        return SmallTiles(16, 64, 128, 4, 3, fold)
    return SmallTiles(16, 2 * block_n, 256, 4, 3, fold)


def is_small(W: torch.Tensor | None, packed: Any, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the kernel reads a weight: plain with rows side by side in the products' dtype, or 4 bits in whole blocks.

    From the second token on 4 bits would be unpacked for tensor cores in each program anew; dequantised once they are
    read by cuBLAS in a quarter of the time.

    Args:
        W: The plain matrix `[out, in]`; None for a packed one.
        packed: A `peft.weights.Packed`, or None.
        dtype: That of the products.
        tokens: Rows of x, at most `MOST_TOKENS`.
    """
    if packed is None:
        return W is not None and W.dtype == dtype and W.stride(1) == 1
    return tokens == 1 and packed.kind in ("nf4", "fp4") and packed.shape[1] % packed.blocksize == 0


def small_batch(
    x: torch.Tensor,
    W: torch.Tensor | None,
    packed: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    stats: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scaling: float,
    launches: dict | None = None,
    out: torch.Tensor | None = None,
    tiles: SmallTiles | None = None,
) -> torch.Tensor:
    """y = g∘(x Wᵀ + s·(x Aᵀ Bᵀ + c)) + bias for up to `MOST_TOKENS` rows, in one launch or two; sums in float32.

    Args:
        x: `[..., in]`, contiguous, of the products' dtype.
        W, packed: The weight, see `is_small`.
        a, b: A `[r, in]` and B `[out, r]` in the branch's dtype, contiguous.
        stats: The norm and the gain g, `[2, out]`; None for g = 1.
        bias: `[out]`.
        lora_bias: c `[out]`.
        scaling: s.
        launches: Where the launches for this weight are kept.
        out: Where the result goes, contiguous; None for a new tensor.
        tiles: None for `small_batch_tiles`.

    Returns:
        `[..., out]` in x's dtype.
    """
    out_features, rank = b.shape
    tokens = x.numel() // x.shape[-1]
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    fold = rank <= FOLDED_RANK if tiles is None else tiles.fold
    h = None if fold else torch.nn.functional.linear(x if x.dtype == a.dtype else x.to(a.dtype), a)
    if packed is None:
        pointers, constants = (W, *[None] * 5), (0, 0, 0)
    else:
        scales, (blocksize, nested) = packed4_args(packed)
        pointers = packed.data, *scales
        constants = blocksize, nested, rounding_of(packed, x.dtype)
    key = "small", tokens, stats is None, bias is None, lora_bias is None
    launch = None if launches is None or tiles is not None else launches.get(key)
    if launch is None:
        tiles = tiles or small_batch_tiles(tokens, out_features, rank, packed is not None)
        launch = _small_batch_fwd.prepare(
            (ceil_div(out_features, tiles.block_n), 1, 1),
            (tokens, float(scaling), out_features, x.shape[-1], 0 if W is None else W.stride(0)),
            (
                packed is not None,
                *constants,
                rank,
                *tiles[:3],
                max(power_of_two(rank), 16) if fold else rank_block(rank),
            ),
            tiles.warps,
            tiles.stages,
            keep=(launches, key),
        )
    launch(x, *pointers, a if fold else None, h, b, stats, bias, lora_bias, y)
    return y
