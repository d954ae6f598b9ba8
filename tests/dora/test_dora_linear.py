# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The fused linear layer on every body: output and gradients against float64, shapes, dtypes, and what it saves."""

import copy
import dataclasses

import pytest
import torch
from dora_truth import check, make_case, ours, quantised, reference, run
from torch.utils.checkpoint import checkpoint

from peft import dora
from peft.dora.eager import DenseWeight
from peft.dora.factors import NormCache

PARTS = True
RANKS = (1, 3, 8, 12, 16, 17, 64, 384, 520)  # 520: cuBLAS adds the branch in low precision too
SMALL = {"tokens": (2, 9), "in_features": 33, "out_features": 37}


def dtypes(body, wanted):
    if wanted not in body.dtypes:
        pytest.skip(f"{body.name} does not compute in {wanted}")
    return wanted


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ranks(body, dtype, rank):
    check(make_case(**SMALL, rank=rank, dtype=dtypes(body, dtype), device=body.device), body.route)


@pytest.mark.parametrize("rank", [3, 17, 80])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_several_tiles(body, dtype, bias, rank):
    """Edges in the middle of a tile, in all directions: of the tiles that the body has (the interpreter's are small)."""
    sizes = {"tokens": (3, 50), "in_features": 200, "out_features": 300}
    if body.name == "interpreter":
        sizes = {"tokens": (2, 13), "in_features": 40, "out_features": 35}
    check(make_case(**sizes, rank=rank, dtype=dtypes(body, dtype), device=body.device, bias=bias), body.route)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_more_tokens_than_programs(body, dtype):
    """The pass over dy then takes several blocks of rows a program, and the partial sums are many."""
    if body.name == "torch":
        pytest.skip("for kernels, and PyTorch where they run")
    tokens = (50,) if body.name == "interpreter" else (16_500,)
    case = make_case(tokens, in_features=16, out_features=37, rank=5, dtype=dtypes(body, dtype), device=body.device)
    check(case, body.route)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_small_branch_is_rounded_once(body, dtype):
    """Rounded between base product and gain too, most of a branch below the output's last digit would be gone."""
    case = make_case((3, 50), 64, 37, rank=5, dtype=torch.float32, autocast=dtypes(body, dtype), device=body.device)
    t = case.tensors
    with torch.no_grad():
        t["B"] *= 2e-3
        case.W = case.W.to(dtype)
        t["x"] = t["x"].to(dtype)
        found = {scale: run_of(case, body, scale) for scale in (0.0, 1.0)}
        wide = {name: t[name].to(dtype).double() for name in ("x", "A", "B")}
        delta = case.scaling * wide["B"] @ wide["A"]
        W = case.W.double()
        moved, still = (
            (W + part) * (t["magnitude"].double() / (W + part).norm(dim=1))[:, None] for part in (delta, 0)
        )
        truth = wide["x"] @ (moved - still).t()
    kept = ((found[1.0] - found[0.0]) * truth).sum() / (truth * truth).sum()
    assert 0.5 < kept < 1.5


def run_of(case, body, factor):
    B = case.tensors["B"]
    case.tensors["B"] = B * factor
    with case.context():
        y = ours(body.route)(case).double()
    case.tensors["B"] = B
    return y


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("features", [64, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_packed_weights(body, dtype, features, kind):
    if body.name == "torch":
        pytest.skip("tests/weights has it, and quantising is slow there")
    case = make_case((2, 9), features, 37, rank=17, dtype=dtypes(body, dtype), device=body.device)
    weight = quantised(kind, 37, features, body.device, dtype=dtype)
    case.W, case.weight = weight.dense(dtype), lambda: weight
    check(case, body.route)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [("magnitude",), ("A",), ("B", "lora_bias")], ids="-".join)
def test_parameters_of_several_dtypes(body, wide, dtype):
    """Under autocast each parameter may have its own."""
    case = make_case(**SMALL, lora_bias=True, device=body.device, dtype=torch.float32, autocast=dtypes(body, dtype))
    for name in ("A", "B", "magnitude", "lora_bias"):
        kind = torch.float32 if name in wide else dtype
        case.tensors[name] = case.tensors[name].detach().to(kind).requires_grad_()
    check(case, body.route)


def shifted(tensor):
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor.detach())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_bytes_that_begin_anywhere(body, kind):
    if body.name == "torch":
        pytest.skip("for kernels")
    case = make_case((6,), 64, 21, rank=5, device=body.device)
    weight = quantised(kind, 21, 64, body.device)
    packed = weight.packed()
    moved = dataclasses.replace(packed, data=shifted(packed.data))
    weight.packed = lambda: moved
    case.W, case.weight = weight.dense(torch.float32), lambda: weight
    check(case, body.route)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_that_begin_anywhere(body, dtype):
    """One element past the beginning of their memory: 16 bytes at once can be read of none of them."""
    case = make_case(
        tokens=(2, 3), in_features=32, out_features=24, rank=8, dtype=dtypes(body, dtype), device=body.device
    )
    case.W, case.dy = shifted(case.W), shifted(case.dy)
    case.tensors = {name: None if t is None else shifted(t).requires_grad_() for name, t in case.tensors.items()}
    for case.cache in (None, NormCache()):
        check(case, body.route)
        check(case, body.route)


@pytest.mark.parametrize("plain", [False, True], ids=["dora", "lora"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_biases(body, dtype, bias, lora_bias, plain):
    dtypes(body, dtype)
    case = make_case(**SMALL, dtype=dtype, device=body.device, bias=bias, lora_bias=lora_bias, plain=plain)
    check(case, body.route)


@pytest.mark.parametrize("plain", [False, True], ids=["dora", "lora"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(body, autocast, x_dtype, plain):
    dtypes(body, autocast)
    case = make_case(
        **SMALL,
        rank=12,
        dtype=x_dtype,
        adapter_dtype=torch.float32,
        device=body.device,
        autocast=autocast,
        plain=plain,
    )
    check(case, body.route)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_adapter_without_autocast(body, x_dtype):
    dtypes(body, x_dtype)
    case = make_case(**SMALL, rank=12, dtype=x_dtype, adapter_dtype=torch.float32, device=body.device)
    check(case, body.route)


@pytest.mark.parametrize("tokens", [(), (1,), (0,), (2, 0), (17,), (2, 3, 4)], ids=str)
def test_token_shapes(body, tokens):
    check(make_case(tokens=tokens, in_features=24, out_features=40, device=body.device), body.route)


def test_fan_in_fan_out(body):
    check(make_case(**SMALL, transposed=True, device=body.device), body.route)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_input_that_is_not_contiguous(body, dtype):
    dtypes(body, dtype)
    for cut in (
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[1:, :, 1:],
        lambda x: x.expand(7, *x.shape),
    ):
        view = cut(torch.randn(4, 6, 41, device=body.device).to(dtype))
        case = make_case(view.shape[:-1], view.shape[-1], out_features=18, dtype=dtype, device=body.device)
        case.tensors["x"] = view.detach().requires_grad_()
        check(case, body.route)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_that_is_not_contiguous(body, dtype):
    case = make_case(tokens=(6, 4), dtype=dtypes(body, dtype), device=body.device)
    case.dy = case.dy.transpose(0, 1).contiguous().transpose(0, 1)
    check(case, body.route)
    case.dy = torch.ones((), dtype=dtype, device=body.device).expand(6, 4, 40)
    check(case, body.route)


def test_factors_that_are_not_contiguous(body):
    for cache in (None, NormCache()):
        case = make_case(**SMALL, rank=17, device=body.device)
        case.cache = cache
        for name in ("A", "B"):
            case.tensors[name] = case.tensors[name].detach().t().contiguous().t().requires_grad_()
        check(case, body.route)


def test_zero_rows_have_gain_one(body):
    case = make_case(**SMALL, device=body.device)
    with torch.no_grad():
        case.W[[0, 5, 36]] = 0
        case.tensors["B"][[0, 5, 36]] = 0
    result = run(case, ours(body.route))
    for name, tensor in result.items():
        assert torch.isfinite(tensor).all(), name
    assert (result["y"][..., [0, 5, 36]] == 0).all()
    assert (result["magnitude"][[0, 5, 36]] == 0).all()
    t = case.dy.reshape(-1, 37)[:, 0]
    h = case.scaling * case.tensors["x"].reshape(-1, 33) @ case.tensors["A"].T
    torch.testing.assert_close(result["B"][0], t @ h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_magnitude_of_zero_keeps_its_gradient(body, dtype, bias):
    case = make_case(**SMALL, dtype=dtypes(body, dtype), device=body.device, bias=bias)
    with torch.no_grad():
        case.tensors["magnitude"][::4] = 0
        case.tensors["magnitude"][1::4] = -1e-5
    check(case, body.route)


def test_large_bias_does_not_drown_the_magnitude_gradient(body):
    dtype = torch.float16 if body.name == "interpreter" else torch.bfloat16
    case = make_case(**SMALL, dtype=dtype, device=body.device, bias=True)
    with torch.no_grad():
        case.tensors["bias"] *= 200
    check(case, body.route)


def test_frozen_parts_get_no_gradient_and_change_no_other(body):
    whole = run(make_case(**SMALL, bias=True, lora_bias=True, device=body.device), ours(body.route))
    for frozen in ("x", "A", "B", "magnitude", "lora_bias", "bias"):
        case = make_case(**SMALL, bias=True, lora_bias=True, device=body.device)
        case.tensors[frozen].requires_grad_(False)
        part = run(case, ours(body.route))
        assert frozen not in part
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-5)
    for trained in ("x", "A", "B", "magnitude", "lora_bias", "bias"):
        case = make_case(**SMALL, bias=True, lora_bias=True, device=body.device)
        for name, tensor in case.tensors.items():
            tensor.requires_grad_(name == trained)
        part = run(case, ours(body.route))
        torch.testing.assert_close(part[trained], whole[trained], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(body, mode):
    case = make_case(**SMALL, device=body.device, bias=True)
    case.cache = NormCache()
    with mode():
        y = ours(body.route)(case)
    assert not y.requires_grad
    # What inference mode left in the cache must not reach a training pass.
    torch.testing.assert_close(run(case, ours(body.route))["y"], torch.empty_like(y).copy_(y))


@pytest.mark.parametrize("bias", [False, True])
def test_output_changed_in_place(body, bias):
    def then(change):
        return lambda function: lambda case: change(function(case) * 1 if function is reference else function(case))

    for change in (torch.relu_, lambda y: y.mul_(3.0), lambda y: y.add_(1.0).mul_(y.detach().clone())):
        case = make_case(**SMALL, device=body.device, bias=bias)
        expected = run(case, then(change)(reference))
        found = run(case, then(change)(ours(body.route)))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_checkpointing(body, reentrant, in_place):
    case = make_case(**SMALL, device=body.device, bias=False)
    case.cache = NormCache()

    def layer(x):
        case.tensors["x"], keep = x, case.tensors["x"]
        y = ours(body.route)(case)
        case.tensors["x"] = keep
        return y.mul_(2.0) if in_place else y * 2.0

    plain = run(case, lambda case: layer(case.tensors["x"]))
    names = [name for name in case.tensors if case.tensors[name] is not None]
    for tensor in case.inputs():
        tensor.grad = None
    checkpoint(layer, case.tensors["x"], use_reentrant=reentrant).backward(case.dy)
    for name in names:
        torch.testing.assert_close(case.tensors[name].grad, plain[name], rtol=1e-5, atol=1e-5)


def test_saved_tensors_on_the_cpu(body):
    case = make_case(**SMALL, device=body.device)
    plain = run(case, ours(body.route))
    with torch.autograd.graph.save_on_cpu():
        y = ours(body.route)(case)
        y.mul_(1.0)
    grads = torch.autograd.grad(y, case.inputs(), case.dy)
    for grad, name in zip(grads, ("x", "A", "B", "magnitude"), strict=True):
        torch.testing.assert_close(grad, plain[name], rtol=1e-5, atol=1e-5)


def test_backward_twice_with_a_retained_graph_and_not_without(body):
    case = make_case(**SMALL, device=body.device)
    y = ours(body.route)(case)
    first = torch.autograd.grad(y, case.inputs(), case.dy, retain_graph=True)
    second = torch.autograd.grad(y, case.inputs(), case.dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, case.inputs(), case.dy)


def test_second_derivative_is_refused(body):
    case = make_case(**SMALL, device=body.device)
    (dx,) = torch.autograd.grad(ours(body.route)(case), case.tensors["x"], case.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_gradient_belongs_to_the_forward_pass_whatever_was_written_since(body):
    """forward, change A and B behind torch's back, forward again, then both backward passes."""
    case = make_case(**SMALL, device=body.device)
    case.cache = NormCache()
    expected_first = run(case, ours(body.route))
    y_first = ours(body.route)(case)
    for name in ("A", "B", "magnitude"):
        case.tensors[name].data.mul_(1.5)
    expected_second = run(case, ours(body.route))
    y_second = ours(body.route)(case)
    inputs = case.inputs()
    if body.name == "torch":  # elsewhere no copies are made: like PyTorch itself, it reads the parameters as they are
        grads = torch.autograd.grad(y_first, inputs, case.dy)
        for grad, name in zip(grads, ("x", "A", "B", "magnitude"), strict=True):
            torch.testing.assert_close(grad, expected_first[name], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y_second, inputs, case.dy)
    for grad, name in zip(grads, ("x", "A", "B", "magnitude"), strict=True):
        torch.testing.assert_close(grad, expected_second[name], rtol=1e-5, atol=1e-5)


def test_plain_lora_sees_a_parameter_changed_in_place(body):
    case = make_case(**SMALL, device=body.device, plain=True)
    y = ours(body.route)(case)
    with torch.no_grad():
        case.tensors["A"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.dy)


def test_nothing_is_kept_alive_after_backward(body):
    case = make_case(**SMALL, device=body.device)
    y = ours(body.route)(case)
    node = y.grad_fn
    y.backward(case.dy)
    assert node.factors is None and node.output is None


def test_gradcheck():
    case = make_case(tokens=(4,), in_features=5, out_features=6, dtype=torch.float64, bias=True, lora_bias=True)
    t = case.tensors

    def function(x, magnitude, lora_bias, bias):
        # A and B are held: the norm is a constant for the gradient, but not for a finite difference.
        return dora.linear(
            x,
            DenseWeight(case.W, bias),
            t["A"].detach(),
            t["B"].detach(),
            scaling=0.5,
            magnitude=magnitude,
            lora_bias=lora_bias,
        )

    assert torch.autograd.gradcheck(function, (t["x"], t["magnitude"], t["lora_bias"], t["bias"]))

    def plain(x, A, B, lora_bias):
        return dora.linear(x, DenseWeight(case.W), A, B, scaling=0.5, lora_bias=lora_bias)

    assert torch.autograd.gradcheck(plain, (t["x"], t["A"], t["B"], t["lora_bias"]))


def test_torch_func(body):
    case = make_case(**SMALL, device=body.device, bias=True)
    expected = run(case, ours(body.route))
    t = {name: None if tensor is None else tensor.detach() for name, tensor in case.tensors.items()}

    def loss(A, magnitude):
        held = copy.copy(case)
        held.tensors = {**t, "A": A, "magnitude": magnitude}
        return (ours(body.route)(held) * case.dy).sum()

    da, dm = torch.func.grad(loss, argnums=(0, 1))(t["A"], t["magnitude"])
    torch.testing.assert_close(da, expected["A"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dm, expected["magnitude"], rtol=1e-4, atol=1e-4)


def test_errors_name_the_shapes(body):
    case = make_case(**SMALL, device=body.device)
    t = case.tensors
    with pytest.raises(ValueError, match=r"x has shape \(4, 5\)"):
        dora.linear(torch.ones(4, 5, device=body.device), case.weight(), t["A"], t["B"], scaling=1.0, route=body.route)
    for magnitude in (None, t["magnitude"]):
        with pytest.raises(ValueError, match=r"expected A \[r, 33\] and B \[37, r\]"):
            dora.linear(t["x"], case.weight(), t["A"].T, t["B"], scaling=1.0, magnitude=magnitude, route=body.route)


def test_dtype_mismatch_is_refused_as_by_the_layer_itself(body):
    case = make_case(**SMALL, device=body.device)
    t = case.tensors
    with pytest.raises(RuntimeError, match="dtype"):
        dora.linear(
            t["x"].half(), case.weight(), t["A"], t["B"], scaling=1.0, magnitude=t["magnitude"], route=body.route
        )
