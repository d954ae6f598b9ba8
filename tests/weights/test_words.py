# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Integers in words, bit by bit, and the integers nearest to a matrix."""

import pytest
import torch

from peft.weights.words import nearest, pack, unpack, unpack_columns


def by_bits(codes, bits, dtype):
    """The words of one column, made of a string of bits."""
    width = 8 * dtype.itemsize
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes.tolist())
    stream += "0" * (-len(stream) % width)
    words = [int(stream[i : i + width][::-1], 2) for i in range(0, len(stream), width)]
    return torch.tensor([word - (1 << width) if word >> (width - 1) else word for word in words], dtype=dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("count", [1, 32, 43, 96])
def test_words_are_a_stream_of_bits(bits, dtype, count):
    codes = torch.randint(1 << bits, (count, 3), dtype=torch.int16)
    words = pack(codes, bits, dtype)
    assert words.dtype == dtype
    assert torch.equal(words, torch.stack([by_bits(column, bits, dtype) for column in codes.T], 1))
    assert torch.equal(unpack(words, bits, count), codes)
    for a, b in ((0, count), (count // 3, count), (count // 2, count // 2), (count - 1, count)):
        assert torch.equal(unpack_columns(words.T, bits, a, b, count), codes.T[:, a:b])


GROUP = torch.arange(64) // 16


def quantised(n=5, bits=4):
    """What is stored, its scales and zero points, and its integers."""
    scale = (torch.rand(n, 4) + 0.1).half()
    zero = torch.randint(1 << bits, (n, 4), dtype=torch.int16)
    codes = torch.randint(1 << bits, (n, 64), dtype=torch.int16)
    return (codes - zero[:, GROUP]).float() * scale[:, GROUP].float(), scale, zero, codes


def read(codes, scale, zero):
    return (codes - zero[:, GROUP]).float() * scale[:, GROUP].float()


def test_what_is_stored_stays():
    old, scale, zero, codes = quantised()
    new = nearest(old, old, scale, zero, GROUP, 4)
    assert all(map(torch.equal, new, (codes, scale, zero)))


def test_small_changes_keep_the_grid_and_stretched_rows_stretch_it():
    old, scale, zero, codes = quantised()
    moved = old + 0.1 * scale[:, GROUP].float() * (torch.rand(old.shape) - 0.5)
    found, near, same = nearest(moved, old, scale, zero, GROUP, 4)
    assert torch.equal(found, codes) and torch.equal(same, zero)
    torch.testing.assert_close(near, scale, rtol=0.05, atol=0)
    assert (read(found, near, same) - moved).norm() <= (old - moved).norm()
    gain = torch.tensor([0.5, 1.0, 2.0, 1.25, 4.0])[:, None]
    found, stretched, same = nearest(gain * old, old, scale, zero, GROUP, 4)
    assert torch.equal(found, codes) and torch.equal(same, zero)
    torch.testing.assert_close(stretched.float(), gain * scale.float(), rtol=1e-3, atol=0)


def test_another_matrix_gets_the_ranges_that_it_has():
    old, scale, zero, _ = quantised()
    matrix = torch.randn(5, 64) * 10
    error = (read(*nearest(matrix, old, scale, zero, GROUP, 4)) - matrix).abs()
    span = torch.stack([part.amax(1) - part.amin(1) for part in matrix.split(16, 1)], 1)[:, GROUP]
    assert (error <= 0.55 * span / 15 + 1e-3).all()


def test_groups_of_zeros_stay_zero():
    old, scale, zero, _ = quantised()
    matrix = old.clone()
    matrix[:, :16] = 0
    stored = read(*nearest(matrix, old, scale, zero, GROUP, 4))
    assert torch.equal(stored[:, :16], matrix[:, :16])
    none = torch.zeros(5, 64)
    assert torch.equal(read(*nearest(none, none, torch.zeros(5, 4).half(), zero, GROUP, 4)), none)
