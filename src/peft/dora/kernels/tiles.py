# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Tile sizes by formula. The interpreter gets small ones, so that a small case has edges and several programs."""

from __future__ import annotations

from typing import NamedTuple

from .launch import INTERPRETED


class NormTiles(NamedTuple):
    """BLOCK_M, BLOCK_K, the number of warps and of stages of the row norm."""

    block_m: int
    block_k: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rank_block(rank: int, most: int = 64) -> int:
    """Ranks a product takes at once; the tensor cores want 16 at least."""
    return min(max(power_of_two(rank), 16), most)


def compose_tiles(tokens: int, rank: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_R and the number of warps of the pass over the output."""
    if INTERPRETED:
        return 16, 16, rank_block(rank, 16), 1
    if tokens <= 16:
        return 16, 128, rank_block(rank), 4
    # On an H100 the pass is at the memory's speed up to rank 64 or so, from there on a matrix product.
    return (32 if rank <= 64 else 64), 128, rank_block(rank), 4


def gradient_tiles(tokens: int, out_features: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, the blocks of rows that a program goes through, and the number of warps."""
    if INTERPRETED:
        return 8, 16, 2, 1
    block_m, block_n = 32, 128
    # Enough programs for an H100's 132 multiprocessors, and few partial sums for each output feature.
    programs = max(4, 512 // ceil_div(out_features, block_n))
    return block_m, block_n, max(1, ceil_div(ceil_div(tokens, block_m), programs)), 4


def norm_tiles(rank: int, weight_format: int) -> NormTiles:
    """Tiles of the row norm: a small rank reads W and little else, a large one is a matrix product.

    Args:
        rank: r.
        weight_format: PLAIN, FOUR_BIT or EIGHT_BIT of `row_norm.py`.
    """
    if INTERPRETED:
        return NormTiles(16, 32, 1, 1)
    if rank > 64:
        return NormTiles(64, 64, 4, 3)
    return NormTiles(32, 128, 4, 3)
