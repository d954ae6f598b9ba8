# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A layer's forward pass in one launch of tensor cores, and dx with dA in another. cuBLAS multiplies faster, but each of
its calls costs the host as much as a launch: up to a thousand tokens or so the GPU waits for the host."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .compose import counters
from .launch import INTERPRETED, Kernel
from .tiles import ceil_div, rank_block

MOST_RANK = 32
# Where an H100 would wait for its host no longer: then cuBLAS, which takes two thirds of the time, is ahead.
MOST_TOKENS = 1536
MOST_WORK = 2**36  # tokens × out × in, from which on it is cuBLAS's
SHARED_BYTES = 200 * 2**10  # that a program may have, and on what these tiles were tried


@triton.jit
def block_of(tokens, columns, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """The row and the column of a program's block: GROUP rows beside each other share what they read of the matrix."""
    rows = tl.cdiv(tokens, BLOCK_M)
    in_group = GROUP * tl.cdiv(columns, BLOCK_C)
    first = tl.program_id(0) // in_group * GROUP
    here = min(rows - first, GROUP)
    i = tl.program_id(0) % in_group
    return first + i % here, i // here


@triton.jit(do_not_specialize=["tokens"])
def whole_fwd_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, stats_ptr, bias_ptr, lora_bias_ptr, h_ptr, v_ptr, y_ptr,
    tokens, scaling, out_features, in_features, stride_wn,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    i_m, i_n = block_of(tokens, out_features, BLOCK_M, BLOCK_N, GROUP)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < tokens
    m_n = o_n < out_features
    m_r = o_r < RANK
    p_x = x_ptr + o_m[:, None] * in_features + o_k[None, :]
    p_w = w_ptr + o_n[None, :].to(tl.int64) * stride_wn + o_k[:, None]
    p_a = a_ptr + o_r[None, :] * in_features + o_k[:, None]
    b_v = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_h = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        m_k = k + o_k < in_features
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(p_w, mask=m_n[None, :] & m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_a = tl.load(p_a, mask=m_r[None, :] & m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
        b_v = tl.dot(b_x, b_w, b_v)
        b_h = tl.dot(b_x, b_a, b_h)
        p_x += BLOCK_K
        p_w += BLOCK_K
        p_a += BLOCK_K
    b_low = b_h.to(h_ptr.dtype.element_ty)
    if i_n == 0:
        tl.store(h_ptr + o_m[:, None] * RANK + o_r[None, :], b_low, mask=m_m[:, None] & m_r[None, :])
    p_b = b_ptr + o_n[None, :].to(tl.int64) * RANK + o_r[:, None]
    b_b = tl.load(p_b, mask=m_n[None, :] & m_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
    # u/s + h Bᵀ, then times s: a second block of sums would not fit into the registers.
    b_v = tl.dot(b_low, b_b, b_v * (1.0 / scaling))
    if lora_bias_ptr is not None:
        b_v += tl.load(lora_bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_v *= scaling
    o_y = o_m[:, None] * out_features + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if v_ptr is not None:
        tl.store(v_ptr + o_y, b_v.to(v_ptr.dtype.element_ty), mask=m_y)
    if stats_ptr is not None:
        b_v *= tl.load(stats_ptr + out_features + o_n, mask=m_n, other=0.0)[None, :]
    if bias_ptr is not None:
        b_v += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + o_y, b_v.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["tokens"])
def whole_bwd_kernel(
    t_ptr, w_ptr, x_ptr, a_ptr, b_ptr, dx_ptr, da_ptr, partial_ptr, ready_ptr,
    tokens, scaling, out_features, in_features, stride_wn,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    i_m, i_k = block_of(tokens, in_features, BLOCK_M, BLOCK_K, GROUP)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_n = tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    m_m = o_m < tokens
    m_k = o_k < in_features
    m_r = o_r < RANK
    p_t = t_ptr + o_m[:, None] * out_features + o_n[None, :]
    p_w = w_ptr + o_n[:, None].to(tl.int64) * stride_wn + o_k[None, :]
    p_b = b_ptr + o_n[:, None] * RANK + o_r[None, :]
    b_dx = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    b_dh = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for n in range(0, out_features, BLOCK_N):
        m_n = n + o_n < out_features
        b_t = tl.load(p_t, mask=m_m[:, None] & m_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        b_dx = tl.dot(b_t, b_w, b_dx)
        b_dh = tl.dot(b_t, b_b, b_dh)
        p_t += BLOCK_N
        p_w += BLOCK_N * stride_wn
        p_b += BLOCK_N * RANK
    b_low = (b_dh * scaling).to(dx_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R]
    o_a = o_r[:, None] * in_features + o_k[None, :]
    m_a = m_r[:, None] & m_k[None, :]
    b_a = tl.load(a_ptr + o_a, mask=m_a, other=0.0)  # [BLOCK_R, BLOCK_K]
    b_dx = tl.dot(b_low, b_a, b_dx)
    o_x = o_m[:, None] * in_features + o_k[None, :]
    m_x = m_m[:, None] & m_k[None, :]
    tl.store(dx_ptr + o_x, b_dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    if da_ptr is not None:
        b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        b_da = tl.dot(tl.trans(b_x), b_low)  # [BLOCK_K, BLOCK_R], tensor cores want the long side first
        o_da = o_r[None, :] * in_features + o_k[:, None]
        m_da = m_r[None, :] & m_k[:, None]
        # Whoever comes last adds up what all have left, in one order always, and leaves the counter at zero.
        tl.store(partial_ptr + i_m.to(tl.int64) * in_features * RANK + o_da, b_da, mask=m_da)
        tl.debug_barrier()
        if tl.atomic_add(ready_ptr + i_k, 1, sem="acq_rel") == tl.cdiv(tokens, BLOCK_M) - 1:
            tl.store(ready_ptr + i_k, 0)
            b_da = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
            for part in range(tl.cdiv(tokens, BLOCK_M)):
                p_da = partial_ptr + tl.cast(part, tl.int64) * in_features * RANK + o_da
                b_da += tl.load(p_da, mask=m_da, other=0.0, cache_modifier=".cg")
            tl.store(da_ptr + o_da, b_da.to(da_ptr.dtype.element_ty), mask=m_da)


_whole_fwd = Kernel(whole_fwd_kernel)
_whole_bwd = Kernel(whole_bwd_kernel)


class WholeTiles(NamedTuple):
    """Rows, columns and summed elements of a block, the number of warps and of stages, and the rows beside each other."""

    block_m: int
    block_c: int
    block_s: int
    warps: int
    stages: int
    group: int


TILES = (
    WholeTiles(128, 256, 64, 8, 3, 8),
    WholeTiles(128, 128, 64, 8, 4, 8),
    WholeTiles(64, 128, 64, 4, 4, 8),
    WholeTiles(64, 64, 128, 4, 3, 8),
)
ENOUGH = 100  # programs for an H100's 132 multiprocessors


def whole_tiles(tokens: int, columns: int) -> WholeTiles:
    """The largest tiles of which an output of `columns` columns has enough, as measured; else the smallest."""
    if INTERPRETED:
        return WholeTiles(16, 32, 32, 1, 1, 2)
    for tiles in TILES:
        if ceil_div(tokens, tiles.block_m) * ceil_div(columns, tiles.block_c) >= ENOUGH:
            return tiles
    return TILES[-1]


def most_whole(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rank: int, scaling: float) -> int:
    """Tokens up to which the kernels here make the passes over a layer; 0 for none.

    Args:
        device: Where the layer is.
        dtype: Of all products.
        shape: W's, `(out, in)`.
        rank: r.
        scaling: s, by which the sums are divided on their way.
    """
    if dtype not in (torch.float16, torch.bfloat16) or rank > MOST_RANK or not 2.0**-20 < abs(scaling) < 2.0**20:
        return 0
    if not INTERPRETED and _shared_bytes(device) < SHARED_BYTES:
        return 0
    return min(MOST_TOKENS, (MOST_WORK - 1) // max(shape[0] * shape[1], 1))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def whole_fwd(
    x: torch.Tensor,
    W: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    stats: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scaling: float,
    keep_v: bool = False,
    launches: dict | None = None,
    tiles: WholeTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y = g∘v + bias with v = x Wᵀ + s·(h Bᵀ + c), and h = x Aᵀ, in one launch; sums in float32.

    Args:
        x: `[..., in]`, contiguous, float16 or bfloat16.
        W: `[out, in]` in x's dtype; its rows may have any distance.
        a, b: A `[r, in]` and B `[out, r]` in x's dtype, contiguous.
        stats: The norm and the gain g, `[2, out]`; None for g = 1.
        bias: `[out]`.
        lora_bias: c `[out]`.
        scaling: s, not zero.
        keep_v: Whether v is wanted.
        launches: Where the launches are kept.
        tiles: None for `whole_tiles`.

    Returns:
        y `[..., out]`, h `[..., r]` and v like y, or None, all in x's dtype.
    """
    out_features, rank = b.shape
    *lead, in_features = x.shape
    tokens = x.numel() // in_features
    y = torch.empty((*lead, out_features), dtype=x.dtype, device=x.device)
    h = torch.empty((*lead, rank), dtype=x.dtype, device=x.device)
    v = torch.empty_like(y) if keep_v else None
    key = "whole", tokens, rank, stats is None, bias is None, lora_bias is None, keep_v, W.stride(0)
    launch = None if launches is None or tiles is not None else launches.get(key)
    if launch is None:
        tiles = tiles or whole_tiles(tokens, out_features)
        launch = _whole_fwd.prepare(
            (ceil_div(tokens, tiles.block_m) * ceil_div(out_features, tiles.block_c), 1, 1),
            (tokens, float(scaling), out_features, in_features, W.stride(0)),
            (rank, *tiles[:3], rank_block(rank), tiles.group),
            tiles.warps,
            tiles.stages,
            keep=(launches, key),
        )
    launch(x, W, a, b, stats, bias, lora_bias, h, v, y)
    return y, h, v


def whole_bwd(
    t: torch.Tensor,
    W: torch.Tensor,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    a_dtype: torch.dtype,
    launches: dict | None = None,
    tiles: WholeTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx = t W + dh A with dh = s·t B, and dA = dhᵀ x, in one launch; sums in float32.

    Args:
        t: g∘dy `[tokens, out]`.
        x: `[..., in]`, as many tokens, contiguous; None where dA is not wanted.
        W, a, b, scaling: As of `whole_fwd`.
        a_dtype: That of dA.
        launches, tiles: As of `whole_fwd`.

    Returns:
        dx like x, or `[tokens, in]` without it, in t's dtype, and dA `[r, in]`.
    """
    tokens, out_features = t.shape
    rank, in_features = a.shape
    if not t.is_contiguous():
        t = t.contiguous()
    key = "whole gradient", tokens, rank, x is None, a_dtype, W.stride(0)
    launch = None if launches is None or tiles is not None else launches.get(key)
    if launch is None:
        tiles = tiles or whole_tiles(tokens, in_features)
        launch = _whole_bwd.prepare(
            (ceil_div(tokens, tiles.block_m) * ceil_div(in_features, tiles.block_c), 1, 1),
            (tokens, float(scaling), out_features, in_features, W.stride(0)),
            (rank, *tiles[:3], rank_block(rank), tiles.group),
            tiles.warps,
            tiles.stages,
            keep=(launches, key),
        )
    da = partial = ready = None
    if x is None:
        dx = torch.empty((tokens, in_features), dtype=t.dtype, device=t.device)
    else:
        _, block_m, block_k, *_ = launch.constants
        dx = torch.empty_like(x)
        da = torch.empty((rank, in_features), dtype=a_dtype, device=t.device)
        partial = torch.empty(ceil_div(tokens, block_m) * rank * in_features, dtype=torch.float32, device=t.device)
        ready = counters(t.device, ceil_div(in_features, block_k))
    launch(t, W, x, a, b, dx, da, partial, ready)
    return dx, da
