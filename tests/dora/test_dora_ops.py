# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The operators for compilers: schema, fake and autograd link, and a compiled layer that has no graph break."""

import pytest
import torch
from dora_truth import make_case, ours, run

from peft.dora import ops, row_norm
from peft.dora.eager import DenseWeight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_row_norm_op(body, dtype, transposed):
    if dtype not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {dtype}")
    case = make_case(dtype=dtype, device=body.device, transposed=transposed)
    A, B = case.tensors["A"], case.tensors["B"]
    args = (case.W, A, B, 0.5, body.route.path == "triton")
    torch.library.opcheck(ops.row_norm, args)
    torch.testing.assert_close(ops.row_norm(*args), row_norm(DenseWeight(case.W), A, B, 0.5))


@pytest.mark.parametrize("plain", [False, True], ids=["dora", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_compiled_layer(body, autocast, plain):
    if (autocast or torch.float32) not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {autocast}")
    case = make_case(device=body.device, autocast=autocast, bias=True, plain=plain)
    expected = run(case, ours(body.route))
    weight = case.weight()
    case.weight = lambda: weight
    compiled = torch.compile(ours(body.route), backend="aot_eager", fullgraph=True)
    found = run(case, compiled)
    tolerance = 1e-4 if autocast is None else 5e-2
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)
