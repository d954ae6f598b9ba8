# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A few tokens without a gradient: one launch makes a layer's output, and it is as near the truth as PyTorch's."""

from dataclasses import replace

import pytest
import torch
from dora_truth import distance, make_case, ours, quantised, reference

from peft.dora import NormCache

TOKENS = [(), (1,), (1, 1), (2,), (3, 5), (16,), (17,)]


@pytest.fixture
def launched(monkeypatch, body):
    """The names of the kernels that run."""
    if body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora.kernels.launch import Launch

    seen = []
    original = Launch.__call__

    def launch(self, *tensors):
        seen.append(getattr(self.function, "fn", self.function).__name__)
        original(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    return seen


def check(case, route, W=None):
    """The output without gradient, at most twice as far from float64 as plain PyTorch's of the same precision."""
    same = case if W is None else replace(case, W=W)
    exact = same.to(torch.float64)
    with torch.no_grad(), case.context():
        y, plain = ours(route)(case), reference(same)
    with torch.no_grad():
        truth = reference(exact)
    assert y.dtype == plain.dtype and y.shape == plain.shape
    floor = torch.finfo(y.dtype).eps * (4 if y.dtype == torch.float32 else 0.25)
    for error, allowed in zip(distance(y, truth), distance(plain, truth), strict=True):
        assert error <= 2 * allowed + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_tokens(body, launched, dtype, tokens):
    if dtype not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {dtype}")
    check(make_case(tokens=tokens, in_features=70, out_features=41, dtype=dtype, device=body.device), body.route)
    many = "compose_fwd_kernel" if dtype == torch.float32 else "whole_fwd_kernel"
    expected = "small_batch_fwd_kernel" if torch.Size(tokens).numel() <= 16 else many
    assert [name for name in launched if name not in ("cast_fwd_kernel", "norms_fwd_kernel")] == [expected]


@pytest.mark.parametrize("rank", [1, 3, 16, 32, 33, 100])
@pytest.mark.parametrize("tokens", [1, 5])
def test_ranks(body, launched, rank, tokens):
    """Small ones are made in the kernel, larger ones before it."""
    check(make_case(tokens=(tokens,), in_features=130, rank=rank, device=body.device), body.route)
    assert "small_batch_fwd_kernel" in launched


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"lora_bias": True}, {"plain": True}, {"plain": True, "bias": True, "lora_bias": True}],
    ids=str,
)
def test_options(body, launched, options, tokens):
    check(make_case(tokens=(tokens,), device=body.device, **options), body.route)
    assert "small_batch_fwd_kernel" in launched


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_wider_adapters(body, launched, dtypes, tokens, autocast):
    """Their branch is computed in their own dtype, under autocast in the layer's."""
    dtype, adapter_dtype = dtypes
    if dtype not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {dtype}")
    case = make_case(
        tokens=(tokens,), dtype=dtype, adapter_dtype=adapter_dtype, device=body.device,
        autocast=dtype if autocast else None,
    )  # fmt: skip
    check(case, body.route)
    assert "small_batch_fwd_kernel" in launched


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 512])
@pytest.mark.parametrize("tokens", [1, 3])
def test_four_bits(body, launched, kind, nested, blocksize, tokens):
    for dtype in body.dtypes:
        weight = quantised(kind, 33, 512, body.device, nested, blocksize, dtype)
        if weight.packed() is None:
            pytest.skip("interleaved for AVX512: no kernel reads it")
        case = make_case(tokens=(tokens,), in_features=512, out_features=33, dtype=dtype, device=body.device)
        case.weight = lambda weight=weight: weight
        launched.clear()
        check(case, body.route, weight.dense(dtype))
        unpacked = any("dequantise" in name or "beside" in name for name in launched)
        assert ("small_batch_fwd_kernel" in launched, unpacked) == (tokens == 1, tokens > 1)


def test_what_the_kernel_does_not_read(body, launched):
    """A transposed weight, and blocks of scales that span two rows, go the way of many tokens."""
    check(make_case(tokens=(2,), transposed=True, device=body.device), body.route)
    weight = quantised("nf4", 33, 70, body.device)
    case = make_case(tokens=(2,), in_features=70, out_features=33, device=body.device)
    case.weight = lambda: weight
    check(case, body.route, weight.dense(torch.float32))
    assert "small_batch_fwd_kernel" not in launched


@pytest.mark.parametrize("tokens", [1, 5])
def test_zero_rows_and_strides(body, launched, tokens):
    case = make_case(tokens=(tokens,), device=body.device)
    with torch.no_grad():
        case.W[3] = 0
        case.tensors["B"][3] = 0
        case.tensors["magnitude"][3] = 0
    wide = torch.zeros(tokens, 2 * case.W.shape[1], device=body.device)
    wide[:, ::2] = case.tensors["x"].detach()
    case.tensors["x"] = wide[:, ::2]
    check(case, body.route)
    with torch.no_grad():
        assert (ours(body.route)(case)[:, 3] == 0).all()


def test_no_tokens(body, launched):
    case = make_case(tokens=(0, 3), device=body.device)
    with torch.no_grad():
        assert ours(body.route)(case).shape == (0, 3, 40)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_same_twice(body, launched, tokens):
    case = make_case(tokens=(tokens,), in_features=200, device=body.device)
    case.cache = NormCache()
    with torch.no_grad():
        first, second = ours(body.route)(case), ours(body.route)(case)
    assert torch.equal(first, second)


def test_a_recorded_pass_goes_another_way(body, launched):
    case = make_case(tokens=(1,), device=body.device)
    ours(body.route)(case)
    assert "small_batch_fwd_kernel" not in launched
