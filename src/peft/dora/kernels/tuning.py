# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Choosing the row norm's tiles: a short list, cut down to what fits the shape, then measured once a kind of weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .launch import INTERPRETED
from .tiles import power_of_two, rank_block


class NormTiles(NamedTuple):
    """BLOCK_M, BLOCK_K, the number of warps and of stages of the row norm."""

    block_m: int
    block_k: int
    warps: int
    stages: int


CANDIDATES = (
    NormTiles(16, 128, 4, 3),
    NormTiles(16, 256, 4, 3),
    NormTiles(32, 128, 4, 3),
    NormTiles(32, 128, 8, 3),
    NormTiles(64, 64, 4, 3),
    NormTiles(64, 128, 8, 3),
    NormTiles(128, 64, 8, 3),
    NormTiles(128, 128, 8, 3),
)
SMALL = NormTiles(16, 32, 1, 1)
MEASUREMENTS = 5
# 132 multiprocessors on an H100: below this many programs a smaller BLOCK_M is the better one.
FEW_PROGRAMS = 128
# Of the 227 KiB of shared memory that a program can have on Hopper; older ones have 99 at least.
SHARED_BYTES = 96 * 1024

_chosen: dict[tuple, NormTiles] = {}


def prune(out_features: int, rank: int, itemsize: int) -> list[NormTiles]:
    """The candidates worth measuring for a shape.

    A small rank reads W and little else: narrow tiles keep every multiprocessor busy. A large rank is a matrix product:
    wide tiles read A less often.

    Args:
        out_features: Rows of W.
        rank: r.
        itemsize: Bytes of an element of A.
    """
    block_r = rank_block(rank)
    kept = []
    for tiles in CANDIDATES:
        shared = tiles.stages * (tiles.block_k * block_r + tiles.block_m * block_r) * itemsize
        few = -(-out_features // tiles.block_m) < FEW_PROGRAMS and tiles.block_m > 16
        wide = tiles.block_m >= 64
        if shared <= SHARED_BYTES and not few and wide == (rank > 64):
            kept.append(tiles)
    return kept or [CANDIDATES[0]]


def choose(
    kind: tuple, out_features: int, in_features: int, rank: int, itemsize: int, run: Callable[[NormTiles], None]
) -> NormTiles:
    """The tiles for one kind of weight; where several are left, `run` is timed with each of them, once a process.

    Args:
        kind: What the measurement depends on beside the shape: formats, dtypes, device.
        out_features, in_features, rank: The shape.
        itemsize: Bytes of an element of A.
        run: Launches the kernel; nothing is lost when it runs several times.
    """
    if INTERPRETED:
        return SMALL
    key = (*kind, power_of_two(out_features), power_of_two(in_features), rank_block(rank), -(-rank // 64))
    tiles = _chosen.get(key)
    if tiles is None:
        candidates = prune(out_features, rank, itemsize)
        if len(candidates) == 1 or torch._C._cuda_isCurrentStreamCapturing():
            return candidates[0]
        tiles = _chosen[key] = min(candidates, key=lambda tiles: _time(run, tiles))
    return tiles


def _time(run: Callable[[NormTiles], None], tiles: NormTiles) -> float:
    """Milliseconds of the fastest run, after one that compiles."""
    times = []
    for _ in range(1 + MEASUREMENTS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(tiles)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times[1:])
