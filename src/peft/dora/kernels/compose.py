# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The two passes over the output: branch, gain and bias written over the base product; and g∘dy with the magnitude's
gradient summed on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Kernel
from .tiles import ceil_div, compose_tiles, gradient_tiles

# From this rank on cuBLAS adds the branch to the base product before the pass; float32 has no exact tensor cores.
CUBLAS_RANK = {2: 512, 4: 32}


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
    b_v = tl.load(u_ptr + o_u, mask=m_u, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    for r in range(0, RANK, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = o_r < RANK
        p_h = h_ptr + o_m[:, None] * RANK + o_r[None, :]
        p_b = b_ptr + o_n[None, :].to(tl.int64) * RANK + o_r[:, None]
        b_h = tl.load(p_h, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b_b = tl.load(p_b, mask=m_n[None, :] & m_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        b_v = tl.dot(b_h, b_b, b_v, input_precision="ieee")
    if lora_bias_ptr is not None:
        b_c = tl.load(lora_bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK_N]
        b_v += (b_c * scaling)[None, :]
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
    t_ptr,
    partial_ptr,
    tokens,
    steps,
    out_features,
    KEPT_IS_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_p = tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < out_features
    b_gain = tl.load(stats_ptr + out_features + o_n, mask=m_n, other=1.0)  # [BLOCK_N]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(steps):
        o_m = (i_p.to(tl.int64) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_y = o_m[:, None] * out_features + o_n[None, :]
        m_y = (o_m < tokens)[:, None] & m_n[None, :]
        b_dy = tl.load(dy_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if t_ptr is not None:
            tl.store(t_ptr + o_y, (b_dy * b_gain[None, :]).to(t_ptr.dtype.element_ty), mask=m_y)
        if kept_ptr is not None:
            b_sum += b_dy * tl.load(kept_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)
    if kept_ptr is not None:
        b_norm = tl.load(stats_ptr + o_n, mask=m_n, other=1.0)  # [BLOCK_N]
        b_by = b_norm if KEPT_IS_V else b_norm * b_gain
        b_dm = tl.where(b_norm == 0, 0.0, tl.sum(b_sum, 0) / tl.where(b_norm == 0, 1.0, b_by))
        tl.store(partial_ptr + i_p.to(tl.int64) * out_features + o_n, b_dm, mask=m_n)


_compose_fwd = Kernel(compose_fwd_kernel, free=1)
_compose_bwd = Kernel(compose_bwd_kernel, free=2)


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `peft.dora.eager.compose`: u `[tokens, out]` contiguous, in one launch."""
    tokens, out_features = u.shape
    rank = h.shape[1]
    y = torch.empty_like(u) if keep_v else u
    if not tokens:
        return y, u if keep_v else None
    if rank >= CUBLAS_RANK[h.element_size()] and h.dtype == u.dtype:
        u.addmm_(h, b.t())
        rank = 0
        if stats is None and lora_bias is None:
            return u, None
    block_m, block_n, block_r, warps = compose_tiles(tokens, rank)
    _compose_fwd(
        (ceil_div(tokens, block_m) * ceil_div(out_features, block_n), 1, 1),
        (u, y, h, b, stats, bias, lora_bias),
        (tokens, float(scaling), out_features),
        (rank, keep_v, block_m, block_n, block_r),
        warps,
    )
    return y, u if keep_v else None


def scale_gradient(
    dy: torch.Tensor,
    *,
    stats: torch.Tensor,
    kept: torch.Tensor | None,
    kept_is_v: bool,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `peft.dora.eager.scale_gradient`: dy and kept `[tokens, out]` contiguous, in one launch and a sum of its
    partial sums, always in the same order."""
    tokens, out_features = dy.shape
    t = None if dtype is None else torch.empty_like(dy, dtype=dtype)
    if not tokens:
        return t, None if kept is None else torch.zeros_like(stats[0])
    if t is None and kept is None:
        return None, None
    block_m, block_n, steps, warps = gradient_tiles(tokens, out_features)
    parts = ceil_div(tokens, block_m * steps)
    partial = None if kept is None else torch.empty((parts, out_features), dtype=torch.float32, device=dy.device)
    _compose_bwd(
        (ceil_div(out_features, block_n), parts, 1),
        (dy, kept, stats, t, partial),
        (tokens, steps, out_features),
        (kept_is_v, block_m, block_n),
        warps,
    )
    if partial is None:
        return t, None
    return t, partial[0] if parts == 1 else partial.sum(0)
