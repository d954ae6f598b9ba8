# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The gain on top of a base output, and the branch for an input after dropout: against float64 and against autograd."""

import pytest
import torch
from dora_truth import Case, distance, make_case, run

from peft import dora
from peft.dora.eager import DenseWeight


def dtypes(body, wanted):
    if wanted not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {wanted}")
    return wanted


def compose_case(shape, channel_dim, dtype, low_dtype, bias, device):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, kind=dtype):
        return torch.randn(*size, generator=generator).to(kind).to(device).requires_grad_()

    channels = shape[channel_dim]
    norm = torch.rand(channels, generator=generator).to(device) + 0.5
    magnitude = (norm.cpu() * (1 + 0.1 * torch.randn(channels, generator=generator))).to(device).requires_grad_()
    tensors = [draw(*shape), draw(*shape, kind=low_dtype), magnitude, draw(channels) if bias else None]
    return tensors, norm, torch.randn(shape, generator=generator).to(dtype).to(device)


def definition(base, low, magnitude, norm, scaling, bias, channel_dim):
    shape = [1] * base.dim()
    shape[channel_dim] = -1
    shift = 0.0 if bias is None else bias.view(shape)
    return dora.gain(magnitude, norm).view(shape) * (base - shift + scaling * low) + shift


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((3, 7), -1), ((2, 3, 7), 2), ((2, 5, 4), 1), ((2, 1, 3, 4), 1), ((0, 6), -1)], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "low_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_compose(body, shape, channel_dim, bias, dtype, low_dtype):
    tensors, norm, dy = compose_case(shape, channel_dim, dtypes(body, dtype), low_dtype, bias, body.device)

    def both(function, kind):
        leaves = [None if t is None else t.detach().to(kind or t.dtype).requires_grad_() for t in tensors]
        y = function(*leaves)
        used = [leaf for leaf in leaves if leaf is not None]
        return [y.detach(), *torch.autograd.grad(y, used, dy.to(y.dtype))]

    def ours(base, low, magnitude, bias):
        return dora.compose(
            base, low, magnitude=magnitude, norm=norm, scaling=0.75, bias=bias, channel_dim=channel_dim
        )

    truth = both(lambda b, low, m, c: definition(b, low, m, norm.double(), 0.75, c, channel_dim), torch.float64)
    same = both(lambda b, low, m, c: definition(b, low, m, norm, 0.75, c, channel_dim).to(dtype), None)
    mine = both(ours, None)
    floor = 4 * torch.finfo(torch.float32).eps
    for found, plain, exact in zip(mine, same, truth, strict=True):
        assert found.dtype == plain.dtype and found.shape == plain.shape
        for error, allowed in zip(distance(found, exact), distance(plain, exact), strict=True):
            assert error <= 2 * allowed + floor


def test_compose_with_a_gain_near_one_keeps_the_base(body):
    """g·base − base would lose what (g − 1)·base keeps; the base itself comes through to the last bit at g = 1."""
    dtype = torch.float16 if body.name == "interpreter" else torch.bfloat16
    base = torch.randn(64, 32, device=body.device).to(dtype)
    norm = torch.rand(32, device=body.device) + 0.5
    y = dora.compose(base, torch.zeros_like(base), magnitude=norm, norm=norm, scaling=1.0)
    assert torch.equal(y, base)


def test_compose_gradcheck():
    tensors, norm, _ = compose_case((2, 3, 4), 1, torch.float64, torch.float64, True, "cpu")
    tensors[2] = tensors[2].detach().double().requires_grad_()

    def function(base, low, magnitude, bias):
        return dora.compose(base, low, magnitude=magnitude, norm=norm.double(), scaling=0.5, bias=bias, channel_dim=1)

    assert torch.autograd.gradcheck(function, tensors)


def test_compose_zero_norm_and_magnitude_shape(body):
    tensors, norm, dy = compose_case((2, 4, 3, 3), 1, torch.float32, torch.float32, False, body.device)
    norm[1] = 0.0
    magnitude = tensors[2].detach().view(1, 4, 1, 1).requires_grad_()
    y = dora.compose(tensors[0], tensors[1], magnitude=magnitude, norm=norm, scaling=1.0, channel_dim=1)
    y.backward(dy)
    assert magnitude.grad.shape == (1, 4, 1, 1) and magnitude.grad[0, 1] == 0
    torch.testing.assert_close(y[:, 1], (tensors[0] + tensors[1])[:, 1])
    assert all(torch.isfinite(tensor.grad).all() for tensor in (tensors[0], tensors[1], magnitude))


def test_compose_refuses_shapes_that_do_not_fit():
    base = torch.ones(2, 3)
    with pytest.raises(ValueError, match="must have one shape, with 4 channels"):
        dora.compose(base, base, magnitude=torch.ones(4), norm=torch.ones(4), scaling=1.0)


def branch_of(body):
    def function(case: Case):
        t = case.tensors
        weight = case.weight()
        norm = dora.row_norm(weight, t["A"], t["B"], case.scaling)
        return dora.branch(
            t["x"],
            weight,
            t["A"],
            t["B"],
            scaling=case.scaling,
            magnitude=t["magnitude"],
            norm=norm,
            lora_bias=t["lora_bias"],
            route=body.route,
        )

    return function


def branch_definition(case: Case):
    t = case.tensors
    gain = dora.gain(t["magnitude"], dora.row_norm(DenseWeight(case.W), t["A"], t["B"], case.scaling))
    x, branch = t["x"], t["A"].dtype
    low = (x if case.autocast else x.to(branch)) @ t["A"].T @ t["B"].T
    low = case.scaling * (low if t["lora_bias"] is None else low + t["lora_bias"])
    return ((gain - 1) * (x @ case.W.T) + gain * low).to(case.autocast or x.dtype)


@pytest.mark.parametrize("rank", [1, 12, 64])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("tokens", [(2, 9), (1,), (0,)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter", "autocast"),
    [
        (torch.float64, None, None),
        (torch.float32, None, None),
        (torch.float16, None, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_branch(body, dtype, adapter, autocast, tokens, lora_bias, rank):
    dtypes(body, autocast or dtype)
    case = make_case(
        tokens,
        33,
        37,
        rank,
        dtype=dtype,
        adapter_dtype=adapter,
        autocast=autocast,
        lora_bias=lora_bias,
        device=body.device,
    )
    truth = run(case.to(torch.float64), branch_definition)
    same = run(case, branch_definition)
    mine = run(case, branch_of(body))
    precision = autocast or dtype
    floor = torch.finfo(precision).eps * (4 if precision in (torch.float32, torch.float64) else 0.25)
    for name, tensor in mine.items():
        assert tensor.dtype == same[name].dtype and tensor.shape == same[name].shape
        for error, allowed in zip(distance(tensor, truth[name]), distance(same[name], truth[name]), strict=True):
            assert error <= 2 * allowed + floor, name


def test_base_and_branch_are_the_layer(body):
    """Without dropout, W x + b plus the branch is what the fused layer computes."""
    case = make_case(tokens=(4,), bias=True, lora_bias=True, device=body.device)
    t = case.tensors
    fused = dora.linear(
        t["x"], case.weight(), t["A"], t["B"], scaling=case.scaling, magnitude=t["magnitude"], lora_bias=t["lora_bias"]
    )
    torch.testing.assert_close(torch.nn.functional.linear(t["x"], case.W, t["bias"]) + branch_of(body)(case), fused)


def test_branch_refuses_a_second_derivative_and_wrong_shapes(body):
    case = make_case(device=body.device)
    y = branch_of(body)(case)
    (dx,) = torch.autograd.grad(y, case.tensors["x"], case.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    case.tensors["x"] = case.tensors["x"][..., :-1]
    with pytest.raises(ValueError, match=r"expected \[..., 24\]"):
        branch_of(body)(case)
