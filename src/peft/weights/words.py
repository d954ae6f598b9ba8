# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Few-bit integers in a row of words: a stream of bits, the first integer in the lowest ones, as GPTQ and AWQ store
them; and the integers nearest to a matrix."""

from __future__ import annotations

import torch

# As many integers start and end with a word, whatever their bits.
BLOCK = 32


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` integers of the streams that run down the columns of `words` [words, n]: int16 [count, n]."""
    width, mask = 8 * words.element_size(), (1 << bits) - 1
    if width % bits == 0:
        words = words.to(torch.int16) if bits == width else words  # the mask of 8 bits is no int8
        shifts = torch.arange(0, width, bits, dtype=words.dtype, device=words.device)
        return ((words[:, None] >> shifts[:, None]) & mask).to(torch.int16).flatten(0, 1)[:count]
    wide = words.to(torch.int64) & ((1 << width) - 1)
    bit = torch.arange(count, device=words.device) * bits
    low, offset = bit // width, (bit % width)[:, None]
    high = (low + 1).clamp_(max=len(words) - 1)  # of the last word nothing is taken from there
    return (((wide[low] >> offset) | (wide[high] << (width - offset))) & mask).to(torch.int16)


def pack(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `unpack`: words of `dtype` [ceil(count · bits / width), n] of integers [count, n]."""
    width = 8 * dtype.itemsize
    count, n = codes.shape
    bit = torch.arange(count, device=codes.device) * bits
    low, offset = bit // width, (bit % width)[:, None]
    wide = codes.to(torch.int64) << offset
    words = torch.zeros((-(-count * bits // width) + 1, n), dtype=torch.int64, device=codes.device)
    words.index_add_(0, low, wide & ((1 << width) - 1)).index_add_(0, low + 1, wide >> width)
    words = words[:-1]
    return torch.where(words >= 1 << (width - 1), words - (1 << width), words).to(dtype)


def unpack_columns(words: torch.Tensor, bits: int, a: int, b: int, out: int) -> torch.Tensor:
    """Columns a to b of the integers [n, out] whose streams run along the rows of `words` [n, words]: int16 [n, b − a].

    Args:
        words: Packed integers.
        bits: Of each.
        a, b: First column, and the one behind the last.
        out: How many columns there are.
    """
    width = 8 * words.element_size()
    first, last = a // BLOCK, -(-b // BLOCK)
    size = BLOCK * bits // width
    start, stop = first * BLOCK, min(last * BLOCK, out)
    return unpack(words[:, first * size : last * size].T, bits, stop - start)[a - start : b - start].T


def nearest(
    matrix: torch.Tensor, old: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The integers whose (q − z)·s is nearest to a matrix, with the scale and zero point of each group.

    A group keeps its scale and zero point, or stretches the scale by the factor that fits the old values to the new
    ones best, or takes those of its new range: whichever leaves the smallest squared error, in this order.

    Args:
        matrix: What is to be stored, float32 [n, in].
        old: What was stored, float32 [n, in].
        scale, zero: s and z of what was stored, [n, groups].
        group: Of each column, int64 [in].
        bits: Of an integer.

    Returns:
        `(integers [n, in], scale [n, groups] in its old dtype, zero [n, groups])`, the integers as int16.
    """
    index = group.expand(len(matrix), -1)
    most = (1 << bits) - 1

    def reduced(values: torch.Tensor, how: str) -> torch.Tensor:
        start = torch.zeros(scale.shape, dtype=values.dtype, device=values.device)
        return start.scatter_reduce_(1, index, values, how, include_self=how != "sum")

    lowest, highest = reduced(matrix, "amin"), reduced(matrix, "amax")  # zero among them
    stretch = reduced(matrix * old, "sum") / reduced(old * old, "sum").clamp_min_(1e-30)
    span = ((highest - lowest) / most).to(scale.dtype)
    own_zero = torch.where(span > 0, -lowest / span.float(), 0.0).round_().clamp_(0, most)
    best = None
    for s, z in (
        (scale, zero),
        (torch.where(stretch > 0, scale.float() * stretch, scale.float()).to(scale.dtype), zero),
        (span, own_zero.to(zero.dtype)),
    ):
        step, point = s.float().gather(1, index), z.float().gather(1, index)
        codes = torch.where(step != 0, matrix / step, 0.0).add_(point).round_().clamp_(0, most)
        read = ((codes - point) * step).to(scale.dtype).float()  # so that what is stored already leaves no error
        error = reduced((read - matrix).square_(), "sum")
        if best is None:
            best = codes, s, z, error
            continue
        better = error < best[3]
        best = (
            torch.where(better.gather(1, index), codes, best[0]),
            *(torch.where(better, new, kept) for new, kept in zip((s, z, error), best[1:], strict=True)),
        )
    return best[0].to(torch.int16), best[1], best[2]
