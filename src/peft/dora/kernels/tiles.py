# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Tile sizes by formula. The interpreter gets small ones, so that a small case has edges and several programs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .launch import INTERPRETED

WIDE = torch.version.hip is None


class NormTiles(NamedTuple):
    """BLOCK_M, BLOCK_K, the number of warps and of stages of the row norm."""

    block_m: int
    block_k: int
    block_r: int
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
    return (32 if rank <= 64 else 128), 128, rank_block(rank), 4


class GradientTiles(NamedTuple):
    """BLOCK_M, BLOCK_N, the blocks of rows that a program goes through, the number of warps and of stages."""

    block_m: int
    block_n: int
    steps: int
    warps: int
    stages: int


def gradient_tiles(tokens: int, out_features: int, rank: int) -> GradientTiles:
    """Tiles of the pass over dy; with a rank it sums dB too, and then it has to load ahead of the product."""
    if INTERPRETED:
        return GradientTiles(8, 16, 2, 1, 1)
    stages = 3 if rank else 1
    block_m, block_n, programs = (32, 128, 512) if not rank or out_features > 8192 else (64, 64, 1024)
    # Enough programs for an H100's 132 multiprocessors, and few partial sums for each output feature.
    programs = max(4, programs // ceil_div(out_features, block_n))
    return GradientTiles(block_m, block_n, max(1, ceil_div(ceil_div(tokens, block_m), programs)), 4, stages)


def norm_tiles(rank: int, weight_format: int, itemsize: int, wide: bool = WIDE) -> NormTiles:
    """Tiles of the row norm: a small rank reads W and little else, a large one is a matrix product.

    Args:
        rank: r.
        weight_format: PLAIN, FOUR_BIT or EIGHT_BIT of `row_norm.py`.
        itemsize: Bytes of an element of A and B.
        wide: Whether a program may have more than 64 KiB of shared memory.
    """
    if INTERPRETED:
        return NormTiles(16, 32, rank_block(rank), 1, 1)
    if rank > 64:
        return NormTiles(64, 256, 64, 8, 3) if wide and itemsize == 2 else NormTiles(64, 64, 32, 4, 3)
    # Unpacked values are arithmetic, not loads: stages would only take registers from it.
    return NormTiles(32, 128, rank_block(rank), 4, 1 if weight_format == 4 else 3)
