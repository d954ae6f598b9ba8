# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""int8 rows with one scale each, as LLM.int8() stores them (Dettmers et al., arXiv 2208.07339): w = data · scb / 127."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel
from .tiles import ceil_div


@triton.jit
def load_weight8(data_ptr, scb_ptr, o_m, k, out_features, in_features, BLOCK_K: tl.constexpr):
    """The tile W[o_m, k : k + BLOCK_K] in float32."""
    o_k = k + tl.arange(0, BLOCK_K)
    m_m = o_m < out_features
    b_scale = tl.div_rn(tl.load(scb_ptr + o_m, mask=m_m, other=0.0).to(tl.float32), 127.0)  # [BLOCK_M]
    p_w = data_ptr + o_m[:, None] * in_features + o_k[None, :]
    b_w = tl.load(p_w, mask=m_m[:, None] & (o_k < in_features)[None, :], other=0)  # [BLOCK_M, BLOCK_K]
    return b_w.to(tl.float32) * b_scale[:, None]


@triton.jit
def dequantise8_kernel(
    data_ptr, scb_ptr, w_ptr, first, last, out_features, in_features, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    o_m = first + tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K
    o_k = k + tl.arange(0, BLOCK_K)
    b_w = load_weight8(data_ptr, scb_ptr, o_m, k, out_features, in_features, BLOCK_K)  # [BLOCK_M, BLOCK_K]
    p_w = w_ptr + (o_m - first)[:, None] * in_features + o_k[None, :]
    m_w = (o_m < last)[:, None] & (o_k < in_features)[None, :]
    tl.store(p_w, b_w.to(w_ptr.dtype.element_ty), mask=m_w)


_dequantise8 = Kernel(dequantise8_kernel)


def dequantise_packed8(
    packed: Any, dtype: torch.dtype, launches: dict | None = None, rows: tuple[int, int] | None = None
) -> torch.Tensor:
    """The matrix `[out, in]` of int8 rows: data times scb / 127 in float32, rounded once to `dtype`.

    Args:
        packed: The bytes.
        dtype: That of the matrix.
        launches: Where the launches are kept.
        rows: The first row and the one after the last; None for all.
    """
    first, last = (0, packed.shape[0]) if rows is None else rows
    w = torch.empty((last - first, packed.shape[1]), dtype=dtype, device=packed.data.device)
    key = "dequantise", rows
    launch = None if launches is None else launches.get(key)
    if launch is None:
        block_m, block_k = (8, 16) if INTERPRETED else (8, 512)
        launch = _dequantise8.prepare(
            (ceil_div(w.shape[0], block_m), ceil_div(w.shape[1], block_k), 1),
            (first, last, *packed.shape),
            (block_m, block_k),
            keep=(launches, key),
        )
    launch(packed.data, packed.scb, w)
    return w
