# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Packed bytes as the libraries themselves wrote them: dequantised to the same bits as by the library, and with the norm
of the library's own dense weight."""

import importlib.util

import pytest
import torch
from torch import nn

from cases import Format
from peft import dora
from peft.weights import find_weight

OUT, FEATURES = 96, 64
HALF = torch.float16
# Name, shape and settings of each format whose bytes kernels read. Of the last groups of each, 24 is no power of two.
FORMS = [
    *(
        Format(f"{kind}{'-nested' * nested}", HALF, kind, nested)
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    ),
    Format("int8", torch.float32, "int8"),
    *(
        Format(
            f"gptq{bits}{'-act-order' * order}",
            HALF,
            "gptq",
            settings={"bits": bits, "group_size": 32, "desc_act": order},
        )
        for bits in (2, 3, 4, 8)
        for order in (False, True)
    ),
    *(Format(f"awq{bits}", HALF, "awq", settings={"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)),
    *(
        Format(f"hqq{bits}-{axis}", HALF, "hqq", settings={"nbits": bits, "group_size": 32, "axis": axis})
        for bits, axis in (
            (8, 1),
            (6, 1),
            (5, 1),
            (3, 0),
            (3, 1),
            (4, 0),
            (4, 1),
            (2, 0),
            (2, 1),
            (1.58, 1),
            (1, 0),
            (1, 1),
        )
    ),
    Format("hqq4-24", HALF, "hqq", settings={"nbits": 4, "group_size": 24, "axis": 1}),
    Format("hqq2-40", torch.float32, "hqq", settings={"nbits": 2, "group_size": 40, "axis": 1}),
]


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request):
    if importlib.util.find_spec(request.param.quantiser.package) is None:
        pytest.skip(f"{request.param.quantiser.package} is not installed")
    return request.param


def build(form, device):
    features = 3 * form.settings["group_size"] if form.settings.get("group_size", 32) % 32 else FEATURES
    torch.manual_seed(0)
    linear = nn.Linear(features, OUT).requires_grad_(False)
    model = nn.ModuleDict({"body": form.quantiser.build(linear, form)})
    layer = form.quantiser.move(model, device)["body"]
    return find_weight(layer), form.quantiser.dense(layer)


def test_bits_of_the_library(body, form):
    if body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora import kernels

    weight, dense = build(form, body.device)
    packed = weight.packed()
    assert packed is not None
    for dtype in body.dtypes:
        found = kernels.dequantise(packed, dtype)
        if form.quant == "int8":  # LLM.int8() itself never makes its weight dense: ours is rounded once
            torch.testing.assert_close(found, dense.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(found, dense.to(dtype))


def test_norm_of_the_librarys_dense_weight(body, form):
    weight, dense = build(form, body.device)
    generator = torch.Generator().manual_seed(1)
    A = (torch.randn(5, dense.shape[1], generator=generator) / 8).to(body.device)
    B = torch.randn(OUT, 5, generator=generator).to(body.device)
    found = dora.row_norm(weight, A, B, 0.75, route=body.route)
    truth = (dense.double() + 0.75 * B.double() @ A.double()).norm(dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)
