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
        for bits, size in ((4, 32), (4, 96), (4, 24), (8, 32), (3, 32), (3, 12), (2, 64))
        for order in (False, True)
    ),
    *(
        pytest.param(AwqWeight, layouts.awq, (bits, size), {}, id=f"awq{bits}-{size}")
        for bits, size in ((4, 32), (4, 96), (4, 24), (8, 32), (3, 16), (2, 12))
    ),
    *(
        pytest.param(HqqWeight, layouts.hqq, (bits, size), {"axis": axis}, id=f"hqq{bits}-{size}-{axis}")
        for bits, size, axes in ((4, 32, (0, 1)), (4, 24, (1,)), (8, 16, (0, 1)), (2, 8, (0, 1)), (1, 8, (0, 1)))
        for axis in axes
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
        (GptqWeight, layouts.gptq, (4, 32), {}),
        (GptqWeight, layouts.gptq, (3, 32), {"act_order": True}),
        (AwqWeight, layouts.awq, (4, 96), {}),
        (HqqWeight, layouts.hqq, (4, 32), {"axis": 0}),
        (HqqWeight, layouts.hqq, (2, 8), {"axis": 1}),
    ],
)
def test_in_parts_and_again(body, reader, build, arguments, options, monkeypatch):
    """Parts of rows are those of the whole, and a kept launch does what the first one did."""
    if body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora import kernels

    weight, matrix = make(reader, build, arguments, options, shape=(192, 96), device=body.device)
    assert kernels.row_parts(weight.packed(), torch.float16) is None
    monkeypatch.setattr(kernels, "PART_BYTES", 192 * 96 * 2 // 2)
    launches, parts = {}, kernels.row_parts(weight.packed(), torch.float16)
    assert parts == [(0, 128), (128, 192)]
    for _ in range(2):
        found = [kernels.dequantise(weight.packed(), torch.float16, launches, part) for part in parts]
        assert torch.equal(torch.cat(found), matrix)
        assert len(launches) == 2


def test_neighbours_are_told_from_any_order():
    """GPTQ's `g_idx` is looked at once for as long as it stands, and the kernels are told what it says."""
    layer, _ = layouts.gptq((64, 96), 4, 32, torch.float16)
    weight = GptqWeight(layer)
    assert weight.packed().groups is None and weight.packed().blocksize == 32
    with torch.no_grad():
        layer.g_idx[:2] = layer.g_idx[-2:].clone()
    assert torch.equal(weight.packed().groups, layer.g_idx) and weight.packed().blocksize is None


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
