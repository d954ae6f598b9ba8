# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A 4-bit weight unpacked beside a thin product: the weight bit for bit, the product against float64."""

import pytest
import torch
from test_dora_norm import quantised

# tokens, out, in, rank: no multiples of any tile, rows that blocks span, single rows and columns
SHAPES = [(1, 8, 64, 1), (17, 33, 96, 3), (40, 24, 130, 12), (33, 64, 128, 16), (70, 10, 192, 17), (5, 40, 64, 64)]


def low_dtypes(body):
    if body.route.path != "triton":
        pytest.skip("for kernels")
    return [dtype for dtype in body.dtypes if dtype != torch.float32]


def made(shape, dtype, device, nested):
    tokens, out, features, rank = shape
    generator = torch.Generator().manual_seed(sum(shape))
    weight = quantised("nf4", out, features, device, nested, dtype=dtype)
    x = torch.randn(tokens, features, generator=generator).to(device, dtype)
    A = (torch.randn(rank, features, generator=generator) * features**-0.5).to(device, dtype)
    dh = torch.randn(tokens, rank, generator=generator).to(device, dtype)
    return weight, x, A, dh


def check(found, truth):
    """Sums in float32, rounded once."""
    step = torch.finfo(found.dtype).eps / 2 + torch.finfo(torch.float32).eps * 8
    size = truth.abs().max()
    torch.testing.assert_close(found.double(), truth, rtol=step, atol=float(size) * step)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_forward(body, shape, nested):
    for dtype in low_dtypes(body):
        from peft.dora import kernels

        weight, x, A, _ = made(shape, dtype, body.device, nested)
        W, h = kernels.unpack_beside(weight.packed(), x, A, launches={})
        assert torch.equal(W, weight.dense(dtype))
        assert h.dtype == dtype
        check(h, x.double() @ A.double().t())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(body, shape):
    for dtype in low_dtypes(body):
        from peft.dora import kernels

        weight, x, _, dh = made(shape, dtype, body.device, True)
        W, da = kernels.unpack_beside(weight.packed(), x, dh, torch.float32)
        assert torch.equal(W, weight.dense(dtype))
        assert da.dtype == torch.float32
        truth = dh.double().t() @ x.double()
        torch.testing.assert_close(da.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_some_rows(body):
    for dtype in low_dtypes(body):
        from peft.dora import kernels

        weight, x, A, _ = made((9, 70, 64, 4), dtype, body.device, True)
        for first, last in ((0, 32), (32, 70)):
            W, h = kernels.unpack_beside(weight.packed(), x.view(3, 3, 64), A, rows=(first, last))
            assert torch.equal(W, weight.dense(dtype)[first:last])
            assert h.shape == (3, 3, 4)
            check(h.view(9, 4), x.double() @ A.double().t())


def test_what_goes_beside(body):
    low_dtypes(body)
    from peft.dora import kernels

    packed = quantised("nf4", 8, 64, body.device).packed()
    eight = quantised("int8", 8, 64, body.device).packed()
    bf16, fp32 = torch.bfloat16, torch.float32
    assert kernels.goes_beside(packed, bf16, bf16, 64)
    assert not kernels.goes_beside(packed, bf16, bf16, 65)
    assert not kernels.goes_beside(packed, bf16, fp32, 8)
    assert not kernels.goes_beside(packed, fp32, fp32, 8)
    assert not kernels.goes_beside(eight, bf16, bf16, 8)
    assert not kernels.goes_beside(None, bf16, bf16, 8)
