# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The row norm on every body: against float64, in chunks, from packed bytes, and never in TF32."""

import types

import pytest
import torch
from dora_truth import distance, make_case, quantised

from peft import dora
from peft.dora import norm as norm_module
from peft.dora.eager import DenseWeight
from peft.dora.route import Route


def factors(out, features, rank, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype).to(device)

    return draw(out, features), draw(rank, features), draw(out, rank)


def check(weight, W, A, B, scaling, route):
    truth = dora.weight_norm(W.double(), A.double(), B.double(), scaling)
    found = dora.row_norm(weight, A, B, scaling, route=route)
    assert found.dtype == (torch.float64 if W.dtype == torch.float64 else torch.float32)
    plain = dora.weight_norm(W.float(), A.float(), B.float(), scaling)
    error, largest = distance(found, truth)
    allowed, allowed_largest = distance(plain, truth)
    floor = 4 * torch.finfo(torch.float32).eps
    assert error <= 2 * allowed + floor and largest <= 2 * allowed_largest + floor


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 16, 17, 64, 384])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ranks(body, dtype, rank):
    if dtype not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {dtype}")
    W, A, B = factors(37, 71, rank, dtype, body.device)
    check(DenseWeight(W), W, A, B, 0.75, body.route)


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (100, 1), (16, 32), (17, 33), (3, 257)], ids=str)
def test_shapes_and_layouts(body, shape):
    W, A, B = factors(*shape, 5, torch.float32, body.device)
    check(DenseWeight(W), W, A, B, -1.5, body.route)
    stored = W.t().contiguous()
    check(DenseWeight(stored.t()), W, A, B, -1.5, body.route)
    padded = torch.full((shape[0], shape[1] + 3), float("nan"), device=body.device)
    padded[:, : shape[1]] = W
    check(DenseWeight(padded[:, : shape[1]]), W, A, B, -1.5, body.route)
    every_other = torch.full((shape[0] * 2, shape[1] * 2), float("nan"), device=body.device)
    every_other[::2, ::2] = W
    check(DenseWeight(every_other[::2, ::2]), W, A.t().contiguous().t(), B.t().contiguous().t(), -1.5, body.route)


def test_cancellation_is_exact(body):
    """W + s·BA near zero: an expanded square would have nothing left."""
    _, A, B = factors(33, 50, 4, torch.float32, body.device)
    W = -(0.5 * B.double() @ A.double()).float() * (1 + 1e-3)
    check(DenseWeight(W), W, A, B, 0.5, body.route)


def test_zero_rows(body):
    W, A, B = factors(20, 30, 2, torch.float32, body.device)
    W[::3] = 0
    B[::3] = 0
    assert (dora.row_norm(DenseWeight(W), A, B, 1.0, route=body.route)[::3] == 0).all()


def test_chunks_of_rows(body, monkeypatch):
    W, A, B = factors(50, 64, 3, torch.float32, body.device)
    whole = dora.row_norm(DenseWeight(W), A, B, 1.0)
    monkeypatch.setattr(norm_module, "CHUNK_BYTES", 4 * 4 * 64 * 7)
    seen = []
    weight = DenseWeight(W)
    rows = weight.rows
    weight.rows = lambda a, b, dtype=None: (seen.append((a, b)), rows(a, b, dtype))[1]
    torch.testing.assert_close(dora.row_norm(weight, A, B, 1.0), whole)
    assert seen == [(a, min(a + 7, 50)) for a in range(0, 50, 7)]


def test_memory_stays_within_a_chunk():
    """Neither BA nor W in another dtype is ever there as a whole."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "view" not in str(func):
                largest.append(result.nbytes)
            return result

    W, A, B = factors(6000, 4096, 2, torch.bfloat16, "cpu")
    with Watch():
        dora.row_norm(
            types.SimpleNamespace(shape=(6000, 4096), dtype=W.dtype, rows=lambda a, b, d: W[a:b].to(d)), A, B, 1.0
        )
    assert max(size for size in largest if size != W.nbytes) * 4 <= norm_module.HOST_CHUNK_BYTES + 4 * 4 * 4096


def test_chunks_that_are_differentiated(monkeypatch):
    """torch.func refuses to write to a tensor that is there already."""
    W, A, B = factors(50, 64, 3, torch.float32, "cpu")
    weight = DenseWeight(W)
    expected = torch.stack([dora.row_norm(weight, A, scaled, 1.0) for scaled in (B, 2 * B)])
    monkeypatch.setattr(norm_module, "CHUNK_BYTES", 4 * 4 * 64 * 7)
    found = torch.vmap(lambda scaled: dora.row_norm(weight, A, scaled, 1.0))(torch.stack([B, 2 * B]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_lower_matmul_precision_has_no_effect(body, setting):
    W, A, B = factors(64, 128, 32, torch.float32, body.device)
    exact = dora.row_norm(DenseWeight(W), A, B, 1.0, route=body.route)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        inside = dora.row_norm(DenseWeight(W), A, B, 1.0, route=body.route)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(inside, exact)


def test_switches_for_low_precision_are_off_inside_and_back_outside(monkeypatch):
    """Also where this machine's products do not depend on them."""
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    seen = []
    addmm = torch.addmm

    def watched(*args, **kwargs):
        seen.append([switch.fp32_precision for switch in switches])
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", watched)
    W, A, B = factors(20, 30, 2, torch.float32, "cpu")
    torch.set_float32_matmul_precision("medium")
    try:
        set_to = [switch.fp32_precision for switch in switches]
        dora.row_norm(DenseWeight(W), A, B, 1.0)
        assert seen and all(values == ["ieee", "ieee"] for values in seen)
        assert [switch.fp32_precision for switch in switches] == set_to
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_has_no_effect(body):
    W, A, B = factors(64, 128, 32, torch.float32, body.device)
    exact = dora.row_norm(DenseWeight(W), A, B, 1.0, route=body.route)
    with torch.autocast(body.device, torch.bfloat16):
        assert torch.equal(dora.row_norm(DenseWeight(W), A, B, 1.0, route=body.route), exact)


def test_wrong_shapes_are_refused(body):
    W, A, B = factors(20, 30, 2, torch.float32, body.device)
    with pytest.raises(ValueError, match=r"expected A \[r, 30\] and B \[20, r\]"):
        dora.row_norm(DenseWeight(W), A[:, :-1], B, 1.0, route=body.route)


# Odd features too: rows that begin in the middle of a byte.
@pytest.mark.parametrize(("out", "features"), [(48, 64), (33, 192), (20, 30), (17, 31)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_4bit(body, stored, kind, nested, out, features):
    """Also where the weight that was quantised was a narrow one, to which its values are rounded again."""
    weight = quantised(kind, out, features, body.device, nested, dtype=stored)
    if weight.packed() is None:
        pytest.skip("interleaved for AVX512: no kernel reads it")
    _, A, B = factors(out, features, 5, torch.float32, body.device)
    check(weight, weight.dense(torch.float32), A, B, 0.75, body.route)


def test_packed_8bit(body):
    weight = quantised("int8", 33, 70, body.device)
    _, A, B = factors(33, 70, 5, torch.float32, body.device)
    check(weight, weight.dense(torch.float32), A, B, 0.75, body.route)


@pytest.mark.parametrize("rank", [1, 16, 17, 80])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_with_other_ranks_and_dtypes_of_the_factors(body, dtype, kind, rank):
    if dtype not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {dtype}")
    weight = quantised(kind, 37, 192, body.device)
    _, A, B = factors(37, 192, rank, dtype, body.device)
    check(weight, weight.dense(torch.float32), A, B, 0.75, body.route)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_dequantised_bit_for_bit(body, stored, kind, dtype):
    if body.route.path != "triton" or dtype not in body.dtypes:
        pytest.skip("for kernels, in dtypes that they compute in")
    from peft.dora import kernels

    for nested in (False, True):
        for shape in ((33, 70), (16, 64), (7, 31)):
            weight = quantised(kind, *shape, body.device, nested, dtype=stored)
            packed = weight.packed()
            found, expected = kernels.dequantise(packed, dtype), weight.dense(torch.float32).to(dtype)
            if kind == "int8" and body.device == "cuda":  # PyTorch divides by 127 by a product there
                torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
            else:
                assert torch.equal(found, expected)


def test_a_format_that_no_kernel_reads_goes_to_pytorch(body):
    W, A, B = factors(20, 30, 2, torch.float32, body.device)
    weight = DenseWeight(W)
    weight.format = "of the future"
    torch.testing.assert_close(
        dora.row_norm(weight, A, B, 1.0, route=body.route), dora.row_norm(DenseWeight(W), A, B, 1.0)
    )
    cache = dora.NormCache()
    m = torch.ones(20, device=body.device)
    found = cache.factors(weight, A, B, 1.0, torch.float32, triton=body.route.path == "triton", magnitude=m)
    torch.testing.assert_close(found.stats[0] * found.stats[1], m)


def test_float64_on_a_triton_route_is_computed_in_float64():
    W, A, B = factors(20, 30, 2, torch.float64, "cpu")
    check(DenseWeight(W), W, A, B, 1.0, Route("triton", "planned before the dtype changed"))


def test_case_maker_sets_the_magnitude_near_the_norm():
    case = make_case()
    gain = dora.gain(case.tensors["magnitude"], dora.weight_norm(case.W, case.tensors["A"], case.tensors["B"], 0.75))
    assert 0.5 < gain.min() and gain.max() < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_large_packed_weight_is_dequantised_in_parts(body, monkeypatch, dtype):
    """Output and gradients are those of the whole matrix, and no larger part than allowed is ever dense."""
    if body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora import kernels

    weight = quantised("nf4", 300, 64, body.device)
    _, A, B = factors(300, 64, 5, torch.float32, body.device)
    leaves = [torch.randn(7, 64, device=body.device, dtype=dtype), A, B, torch.rand(300, device=body.device) + 0.5]
    made, original = [], kernels.dequantise

    def step():
        x, a, b, m = [leaf.detach().requires_grad_() for leaf in leaves]
        y = dora.linear(x, weight, a, b, scaling=0.5, magnitude=m, cache=dora.NormCache(), route=body.route)
        return [y.detach(), *torch.autograd.grad(y, [x, a, b, m], torch.ones_like(y))]

    def dequantise(*args):
        made.append(original(*args))
        return made[-1]

    whole = step()
    monkeypatch.setattr(kernels, "dequantise", dequantise)
    monkeypatch.setattr(kernels, "PART_BYTES", 300 * 64 * dtype.itemsize - 1)
    for found, expected in zip(step(), whole, strict=True):
        tolerance = 1e-5 if found.dtype == torch.float32 == dtype else 1e-2  # the adapter is the wider one in float16
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert [len(part) for part in made] == [256, 44] * 2
