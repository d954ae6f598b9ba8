# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The two passes over the output: branch, gain and bias written over the base product; and g∘dy with the gradients of
the magnitude and of B summed on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Kernel
from .tiles import ceil_div, compose_tiles, gradient_tiles, rank_block

# From this rank on cuBLAS adds the branch to the base product before the pass; float32 has no exact tensor cores.
CUBLAS_RANK = {2: 512, 4: 32}
FUSED_RANK = 32  # up to here dB is summed in the pass over dy; a larger one is a product worth its own launch


@triton.jit(do_not_specialize=["tokens"])
def compose_fwd_kernel(
    u_ptr,
    y_ptr,
    h_ptr,
    b_ptr,
    stats_ptr,
    bias_ptr,
    lora_bias_ptr,
    tokens,
    scaling,
    out_features,
    RANK: tl.constexpr,
    KEEP_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_n = tl.program_id(0) % tl.cdiv(out_features, BLOCK_N)
    i_m = tl.program_id(0) // tl.cdiv(out_features, BLOCK_N)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < tokens
    m_n = o_n < out_features
    o_u = o_m[:, None] * out_features + o_n[None, :]
    m_u = m_m[:, None] & m_n[None, :]
    b_low = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in range(0, RANK, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = o_r < RANK
        p_h = h_ptr + o_m[:, None] * RANK + o_r[None, :]
        p_b = b_ptr + o_n[None, :].to(tl.int64) * RANK + o_r[:, None]
        b_h = tl.load(p_h, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b_b = tl.load(p_b, mask=m_n[None, :] & m_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        b_low = tl.dot(b_h, b_b, b_low, input_precision="ieee")
    if lora_bias_ptr is not None:
        b_low += tl.load(lora_bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_v = tl.load(u_ptr + o_u, mask=m_u, other=0.0).to(tl.float32) + scaling * b_low  # [BLOCK_M, BLOCK_N]
    if KEEP_V:
        tl.store(u_ptr + o_u, b_v.to(u_ptr.dtype.element_ty), mask=m_u)
    if stats_ptr is not None:
        b_v *= tl.load(stats_ptr + out_features + o_n, mask=m_n, other=0.0)[None, :]
    if bias_ptr is not None:
        b_v += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + o_u, b_v.to(y_ptr.dtype.element_ty), mask=m_u)


@triton.jit(do_not_specialize=["tokens", "steps"])
def compose_bwd_kernel(
    dy_ptr,
    kept_ptr,
    stats_ptr,
    h_ptr,
    t_ptr,
    dm_ptr,
    db_ptr,
    partial_ptr,
    ready_ptr,
    tokens,
    steps,
    scaling,
    out_features,
    KEPT_IS_V: tl.constexpr,
    SPLIT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_p = tl.program_id(1)
    parts = tl.num_programs(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    m_n = o_n < out_features
    m_db = m_n[:, None] & (o_r < RANK)[None, :]
    o_db = o_n[:, None].to(tl.int64) * RANK + o_r[None, :]
    b_gain = tl.load(stats_ptr + out_features + o_n, mask=m_n, other=1.0)  # [BLOCK_N]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_db = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        o_m = (i_p.to(tl.int64) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_y = o_m[:, None] * out_features + o_n[None, :]
        m_y = (o_m < tokens)[:, None] & m_n[None, :]
        b_dy = tl.load(dy_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if t_ptr is not None:
            b_t = (b_dy * b_gain[None, :]).to(t_ptr.dtype.element_ty)
            tl.store(t_ptr + o_y, b_t, mask=m_y)
            if db_ptr is not None:
                p_h = h_ptr + o_m[:, None] * RANK + o_r[None, :]
                b_h = tl.load(
                    p_h, mask=(o_m < tokens)[:, None] & (o_r < RANK)[None, :], other=0.0
                )  # [BLOCK_M, BLOCK_R]
                b_db = tl.dot(tl.trans(b_t), b_h, b_db, input_precision="ieee")
        if kept_ptr is not None:
            b_sum += b_dy * tl.load(kept_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_total = tl.sum(b_sum, 0)  # [BLOCK_N]
    is_last = True
    if SPLIT:
        # Whoever comes last adds up what all have left, in one order always, and leaves the counter at zero.
        p_db = partial_ptr + parts.to(tl.int64) * out_features + o_db
        if kept_ptr is not None:
            tl.store(partial_ptr + i_p.to(tl.int64) * out_features + o_n, b_total, mask=m_n)
        if db_ptr is not None:
            tl.store(p_db + i_p.to(tl.int64) * out_features * RANK, b_db, mask=m_db)
        tl.debug_barrier()
        is_last = tl.atomic_add(ready_ptr + i_n, 1, sem="acq_rel") == parts - 1
    if is_last:
        if SPLIT:
            tl.store(ready_ptr + i_n, 0)
            b_total = tl.zeros([BLOCK_N], dtype=tl.float32)
            b_db = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
            for part in range(parts):
                o_part = tl.cast(part, tl.int64) * out_features
                if kept_ptr is not None:
                    b_total += tl.load(partial_ptr + o_part + o_n, mask=m_n, other=0.0, cache_modifier=".cg")
                if db_ptr is not None:
                    b_db += tl.load(p_db + o_part * RANK, mask=m_db, other=0.0, cache_modifier=".cg")
        if kept_ptr is not None:
            b_norm = tl.load(stats_ptr + o_n, mask=m_n, other=1.0)  # [BLOCK_N]
            b_by = b_norm if KEPT_IS_V else b_norm * b_gain
            b_dm = tl.where(b_norm == 0, 0.0, b_total / tl.where(b_norm == 0, 1.0, b_by))
            tl.store(dm_ptr + o_n, b_dm.to(dm_ptr.dtype.element_ty), mask=m_n)
        if db_ptr is not None:
            tl.store(db_ptr + o_db, (b_db * scaling).to(db_ptr.dtype.element_ty), mask=m_db)


_compose_fwd = Kernel(compose_fwd_kernel)
_compose_bwd = Kernel(compose_bwd_kernel)


def compose(
    u: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    stats: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scaling: float,
    keep_v: bool = False,
    launches: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `peft.dora.eager.compose`, in one launch."""
    out_features, rank = b.shape
    tokens = u.numel() // out_features if out_features else 0
    y = torch.empty_like(u) if keep_v else u
    if not tokens:
        return y, u if keep_v else None
    if rank >= CUBLAS_RANK[h.element_size()] and h.dtype == u.dtype:
        u.view(tokens, out_features).addmm_(h.view(tokens, rank), b.t(), alpha=scaling)
        rank = 0
        if stats is None and lora_bias is None:
            return u, None
    tensors = u, y, h, b, stats, bias, lora_bias
    key = "compose", tokens, rank, keep_v, stats is None, bias is None, lora_bias is None
    launch = None if launches is None else launches.get(key)
    if launch is None:
        block_m, block_n, block_r, warps = compose_tiles(tokens, rank)
        launch = _compose_fwd.prepare(
            (ceil_div(tokens, block_m) * ceil_div(out_features, block_n), 1, 1),
            (tokens, float(scaling), out_features),
            (rank, keep_v, block_m, block_n, block_r),
            warps,
            keep=(launches, key),
        )
    launch(*tensors)
    return y, u if keep_v else None


def scale_gradient(
    dy: torch.Tensor,
    *,
    stats: torch.Tensor,
    kept: torch.Tensor | None,
    kept_is_v: bool,
    dtype: torch.dtype | None,
    h: torch.Tensor | None = None,
    scaling: float = 1.0,
    b_dtype: torch.dtype | None = None,
    launches: dict | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `peft.dora.eager.scale_gradient`, in one launch; dB too, for the ranks that fit."""
    out_features = dy.shape[-1]
    tokens = dy.numel() // out_features if out_features else 0
    t = None if dtype is None else torch.empty((tokens, out_features), dtype=dtype, device=dy.device)
    if not tokens:
        return t, None if kept is None else torch.zeros_like(stats[0]), None
    if t is None and kept is None:
        return None, None, None
    rank = 0 if h is None or t is None or h.dtype != dtype else h.shape[-1]
    if rank > FUSED_RANK:
        rank = 0
    key = "gradient", tokens, kept is None, kept_is_v, dtype, rank, b_dtype
    launch = None if launches is None else launches.get(key)
    if launch is None:
        tiles = gradient_tiles(tokens, out_features, rank)
        parts = ceil_div(tokens, tiles.block_m * tiles.steps)
        launch = _compose_bwd.prepare(
            (ceil_div(out_features, tiles.block_n), parts, 1),
            (tokens, tiles.steps, float(scaling), out_features),
            (kept_is_v, parts > 1, rank, tiles.block_m, tiles.block_n, rank_block(rank), tiles.stages),
            tiles.warps,
            keep=(launches, key),
        )
    columns, parts, _ = launch.grid
    dm = None if kept is None else torch.empty(out_features, dtype=stats.dtype, device=dy.device)
    db = torch.empty((out_features, rank), dtype=b_dtype, device=dy.device) if rank else None
    partial = ready = None
    if parts > 1:
        partial = torch.empty(parts * out_features * (1 + rank), dtype=torch.float32, device=dy.device)
        ready = counters(dy.device, columns)
    launch(dy, kept, stats, h if rank else None, t, dm, db, partial, ready)
    return t, dm, db


def counters(device: torch.device, columns: int) -> torch.Tensor:
    """Zeros that every launch leaves as zeros; kept for each stream, whose launches come one after the other, and new for
    a graph that is captured, which may run beside others."""
    place = None
    if device.type == "cuda" and not torch._C._cuda_isCurrentStreamCapturing():
        place = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    found = None if place is None else _kept_counters.get(place)
    if found is None or len(found) < columns:
        found = torch.zeros(columns, dtype=torch.int32, device=device)
        if place is not None:
            _kept_counters[place] = found
    return found


_kept_counters: dict[tuple, torch.Tensor] = {}
