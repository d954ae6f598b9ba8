# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""GPTQ's and AWQ's weights in layers built to the documented layouts: written and restored where no library is there."""

import pytest
import torch

import layouts
from peft.weights.awq import AwqWeight
from peft.weights.gptq import GptqWeight
from peft.weights.hqq import HqqWeight

SHAPE = (64, 96)
WRITTEN = [
    *(
        pytest.param(GptqWeight, layouts.gptq, bits, {"act_order": order}, id=f"gptq{bits}-{order}")
        for bits in (2, 3, 4, 8)
        for order in (False, True)
    ),
    *(pytest.param(AwqWeight, layouts.awq, bits, {}, id=f"awq{bits}") for bits in (2, 3, 4, 8)),
]


@pytest.mark.parametrize(("reader", "build", "bits", "options"), WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_writes_and_restores(reader, build, bits, options, dtype):
    layer, matrix = build(SHAPE, bits, 32, dtype, **options)
    weight, before = reader(layer), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert torch.equal(weight.dense(), matrix)
    snapshot = weight.snapshot()

    weight.write(matrix.float())
    torch.testing.assert_close(weight.dense(), matrix, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if bits < 8 or dtype != torch.bfloat16:  # whose rounding is as coarse as the steps
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())

    gain = torch.rand(SHAPE[0], 1, generator=torch.Generator().manual_seed(3)) + 0.5
    weight.write(gain * matrix.float())
    room = 4 * torch.finfo(dtype).eps
    assert ((weight.dense().float() - gain * matrix.float()).norm() / matrix.float().norm()) < room

    other = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    weight.write(other)
    step = layer.scales.T[:, weight.groups()].float()
    outside = 1e-2 if dtype == torch.float16 else 5e-2  # where a rounded scale or zero point leaves the range's ends
    assert ((weight.dense().float() - other).abs() <= 1.01 * step + outside).all()

    weight.restore(snapshot)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_is_read_by_rows_without_hqq(bits, axis):
    layer, matrix = layouts.hqq(SHAPE, bits, 16, torch.bfloat16, axis=axis)
    weight = HqqWeight(layer)
    assert torch.equal(weight.dense(), matrix)
    for a, b in ((0, 1), (5, 11), (7, 7), (31, 64)):
        assert torch.equal(weight.rows(a, b), matrix[a:b])
    snapshot, key = weight.snapshot(), weight.key()
    layer.meta["scale"].zero_()
    assert weight.key() != key and not weight.dense().any()
    weight.restore(snapshot)
    assert torch.equal(weight.dense(), matrix)
