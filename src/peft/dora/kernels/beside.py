# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A 4-bit weight unpacked and, by other programs of the same launch, the thin product that goes beside it: x Aᵀ in the
forward pass, dhᵀ x in the backward pass. On its own each costs the host a launch, and the GPU more than its traffic."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel
from .packed4 import packed4_args, rounding_of, unpack4
from .tiles import ceil_div, rank_block

MOST_RANK = 64


@triton.jit
def thin_product(
    x_ptr, thin_ptr, product_ptr, i, tokens, in_features,
    RANK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Block i of x Aᵀ `[tokens, r]`, by tokens; with GRADIENT of dhᵀ x `[r, in]`, by input features."""
    o_i = i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < RANK
    if GRADIENT:
        length, summed = in_features, tokens
    else:
        length, summed = tokens, in_features
    m_i = o_i < length
    b_product = tl.zeros([BLOCK_I, BLOCK_R], dtype=tl.float32)
    for c in range(0, summed, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < summed
        if GRADIENT:
            p_x = x_ptr + o_c[None, :].to(tl.int64) * in_features + o_i[:, None]
            p_thin = thin_ptr + o_c[:, None] * RANK + o_r[None, :]
        else:
            p_x = x_ptr + o_i[:, None] * in_features + o_c[None, :]
            p_thin = thin_ptr + o_r[None, :] * in_features + o_c[:, None]
        b_x = tl.load(p_x, mask=m_i[:, None] & m_c[None, :], other=0.0)  # [BLOCK_I, BLOCK_C]
        b_thin = tl.load(p_thin, mask=m_c[:, None] & m_r[None, :], other=0.0)  # [BLOCK_C, BLOCK_R]
        b_product = tl.dot(b_x, b_thin, b_product)
    if GRADIENT:
        p_product = product_ptr + o_r[None, :].to(tl.int64) * in_features + o_i[:, None]
    else:
        p_product = product_ptr + o_i[:, None] * RANK + o_r[None, :]
    tl.store(p_product, b_product.to(product_ptr.dtype.element_ty), mask=m_i[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["tokens", "products"])
def beside4_kernel(
    data_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, w_ptr, x_ptr, thin_ptr, product_ptr,
    first, elements, tokens, in_features, products,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROUND: tl.constexpr, BLOCKS: tl.constexpr,
    RANK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if i < products:  # first, since each of these takes longer
        thin_product(
            x_ptr, thin_ptr, product_ptr, i, tokens, in_features, RANK, GRADIENT, BLOCK_I, BLOCK_C, BLOCK_R
        )  # fmt: skip
    else:
        unpack4(
            data_ptr, absmax_ptr, code_ptr, outer_ptr, outer_code_ptr, offset_ptr, w_ptr, i - products, first, elements,
            BLOCKSIZE, NESTED, ROUND, BLOCKS,
        )  # fmt: skip


_beside4 = Kernel(beside4_kernel)


def goes_beside(packed: Any, dtype: torch.dtype, branch_dtype: torch.dtype, rank: int) -> bool:
    """Whether `unpack_beside` can do it; for the dtypes of tensor cores and the ranks that they finish in the meantime.

    Args:
        packed: A `peft.weights.Packed`, or None.
        dtype, branch_dtype: Those of the base product and of the thin one.
        rank: r.
    """
    if packed is None or packed.kind not in ("nf4", "fp4") or rank > MOST_RANK:
        return False
    return dtype == branch_dtype and dtype in (torch.float16, torch.bfloat16)


def unpack_beside(
    packed: Any,
    x: torch.Tensor,
    thin: torch.Tensor,
    product_dtype: torch.dtype | None = None,
    launches: dict | None = None,
    rows: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """W `[out, in]`, or some rows of it, in x's dtype, and a thin product with x, in one launch.

    Args:
        packed: The bytes of W.
        x: `[..., in]`, contiguous.
        thin: A `[r, in]` for x Aᵀ `[..., r]`, or dh `[tokens, r]` for dhᵀ x `[r, in]`; in x's dtype, contiguous.
        product_dtype: That of dhᵀ x; None asks for x Aᵀ.
        launches: Where the launches are kept.
        rows: As of `dequantise_packed4`.
    """
    first, last = (0, packed.shape[0]) if rows is None else rows
    in_features = packed.shape[1]
    w = torch.empty((last - first, in_features), dtype=x.dtype, device=x.device)
    tokens = x.numel() // in_features
    gradient = product_dtype is not None
    rank = thin.shape[1 if gradient else 0]
    shape = (rank, in_features) if gradient else (*x.shape[:-1], rank)
    product = torch.empty(shape, dtype=product_dtype or x.dtype, device=x.device)
    pointers, constants = packed4_args(packed)
    key = "beside", tokens, rank, product_dtype, rows
    launch = None if launches is None else launches.get(key)
    if launch is None:
        blocks = max(1, (32 if INTERPRETED else 2048) // packed.blocksize)
        block_i, block_c = (16, 16) if INTERPRETED else (64, 64) if gradient else (16, 128)
        products = ceil_div(in_features if gradient else tokens, block_i)
        launch = _beside4.prepare(
            (products + ceil_div(w.numel(), blocks * packed.blocksize), 1, 1),
            (first * in_features, w.numel(), tokens, in_features, products),
            (*constants, rounding_of(packed, x.dtype), blocks, rank, gradient, block_i, block_c, rank_block(rank)),
            fusion=False,  # as of `dequantise_packed4`
            keep=(launches, key),
        )
    launch(packed.data, *pointers, w, x, thin, product)
    return w, product
