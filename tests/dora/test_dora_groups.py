# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Norms and products of weights that GPTQ, AWQ and HQQ store as integers in groups; layers in the documented layouts."""

import pytest
import torch

import layouts
from peft import dora
from peft.weights.awq import AwqWeight
from peft.weights.gptq import GptqWeight
from peft.weights.hqq import HqqWeight

# The last shape is no multiple of any tile.
CASES = [
    *(
        pytest.param(GptqWeight, layouts.gptq, (bits, size), {"act_order": order}, id=f"gptq{bits}-{size}-{order}")
        for bits, size in ((4, 32), (4, 96), (8, 32), (3, 32), (2, 64))
        for order in (False, True)
    ),
    *(
        pytest.param(AwqWeight, layouts.awq, (bits, size), {}, id=f"awq{bits}-{size}")
        for bits, size in ((4, 32), (4, 96), (8, 32), (3, 16))
    ),
    *(
        pytest.param(HqqWeight, layouts.hqq, (bits, size), {"axis": axis}, id=f"hqq{bits}-{size}-{axis}")
        for bits, size in ((4, 32), (8, 16), (2, 8), (1, 8))
        for axis in (0, 1)
    ),
]
STORED = (torch.float32, torch.float16, torch.bfloat16)


def make(reader, build, arguments, options, shape=(64, 96), dtype=torch.float16, device="cpu"):
    layer, matrix = build(shape, *arguments, dtype, **options)
    layer = layer.to(device)
    if hasattr(layer, "meta"):
        layer.meta = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in layer.meta.items()}
    return reader(layer), matrix.to(device)


def factors(shape, device):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, shape[1], generator=generator) * shape[1] ** -0.5
    return A.to(device), torch.randn(shape[0], 5, generator=generator).to(device)


@pytest.mark.parametrize(("reader", "build", "arguments", "options"), CASES)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_norm(body, reader, build, arguments, options, dtype):
    """Read from the packed bytes it is that of the dense weight, within float32's rounding."""
    weight, matrix = make(reader, build, arguments, options, dtype=dtype, device=body.device)
    assert torch.equal(weight.dense(), matrix)
    assert weight.packed() is not None
    A, B = factors(weight.shape, body.device)
    found = dora.row_norm(weight, A, B, 0.75, route=body.route)
    truth = (matrix.double() + 0.75 * B.double() @ A.double()).norm(dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("reader", "build", "arguments", "options"), CASES)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_dequantised_bit_for_bit(body, reader, build, arguments, options, stored):
    if body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora import kernels

    weight, matrix = make(reader, build, arguments, options, dtype=stored, device=body.device)
    for dtype in body.dtypes:
        assert torch.equal(kernels.dequantise(weight.packed(), dtype), matrix.to(dtype))


@pytest.mark.parametrize(
    ("reader", "build", "arguments", "options"),
    [
        (GptqWeight, layouts.gptq, (4, 16), {"act_order": True}),
        (AwqWeight, layouts.awq, (4, 16), {}),
        (HqqWeight, layouts.hqq, (4, 8), {"axis": 1}),
    ],
)
def test_shapes_that_fill_no_tile(body, reader, build, arguments, options):
    weight, matrix = make(reader, build, arguments, options, shape=(40, 48), device=body.device)
    assert weight.packed() is not None
    A, B = factors(weight.shape, body.device)
    truth = (matrix.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(dora.row_norm(weight, A, B, 0.5, route=body.route).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "bits", "size", "axis"), [((40, 24), 3, 16, 0), ((10, 24), 4, 16, 1), ((20, 24), 4, 16, 0)]
)
def test_groups_that_end_within_a_row_are_read_by_pytorch(body, shape, bits, size, axis):
    weight, matrix = make(HqqWeight, layouts.hqq, (bits, size), {"axis": axis}, shape=shape, device=body.device)
    assert weight.packed() is None and torch.equal(weight.dense(), matrix)
    A, B = factors(shape, body.device)
    truth = (matrix.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(dora.row_norm(weight, A, B, 0.5, route=body.route).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("reader", "build", "arguments", "options"), CASES)
def test_pytorch_reads_rows_in_chunks(reader, build, arguments, options, monkeypatch):
    weight, matrix = make(reader, build, arguments, options)
    monkeypatch.setattr("peft.dora.norm.CHUNK_BYTES", 4 * 4 * 96 * 10)  # four float32 matrices of ten rows
    pieces = []
    rows = weight.rows
    monkeypatch.setattr(weight, "rows", lambda a, b, dtype=None: pieces.append(b - a) or rows(a, b, dtype))
    monkeypatch.setattr(weight, "dense", lambda dtype=None: pytest.fail("the whole matrix was built"))
    A, B = factors(weight.shape, "cpu")
    truth = (matrix.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(dora.row_norm(weight, A, B, 0.5).double(), truth, rtol=1e-6, atol=0)
    assert pieces == [10] * 6 + [4]
