# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The bodies, cases of an adapted linear layer, the truth in float64, and how far from it plain PyTorch of the same precision is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch

from peft.dora import dora_linear_reference, gain, linear, row_norm
from peft.dora.eager import DenseWeight
from peft.dora.route import Route
from peft.weights import find_weight

NAMES = ("x", "A", "B", "magnitude", "lora_bias", "bias")


class Body(NamedTuple):
    """Where tensors go, what to pass as a route, the dtypes in which it can be trusted, and whether whole passes may be one
    launch."""

    name: str
    device: str
    route: Route
    dtypes: tuple[torch.dtype, ...]
    whole: bool = True


LOW = (torch.float16, torch.bfloat16)
BODIES = {
    "torch": Body("torch", "cpu", Route("torch", "test"), (torch.float64, torch.float32, *LOW)),
    "torch_gpu": Body("torch_gpu", "cuda", Route("torch", "test"), (torch.float64, torch.float32, *LOW)),
    "triton": Body("triton", "cuda", Route("triton", "test"), (torch.float32, *LOW)),
    # The interpreter multiplies bfloat16 as the integers that hold it.
    "interpreter": Body("interpreter", "cpu", Route("triton", "test"), (torch.float32, torch.float16)),
    # As for more tokens or a larger layer than the others' tests have.
    "triton_parts": Body("triton", "cuda", Route("triton", "test"), LOW, whole=False),
    "interpreter_parts": Body("interpreter", "cpu", Route("triton", "test"), (torch.float16,), whole=False),
}


@dataclass
class Case:
    """One layer with its input; `autocast` is a dtype or None."""

    tensors: dict[str, torch.Tensor | None]
    W: torch.Tensor
    scaling: float
    dy: torch.Tensor
    autocast: torch.dtype | None = None
    cache: object = None
    extra: dict = field(default_factory=dict)

    def weight(self):
        return DenseWeight(self.W, self.tensors["bias"])

    def inputs(self):
        return [self.tensors[name] for name in NAMES if self.tensors[name] is not None]

    def context(self):
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.W.device.type, self.autocast)

    def to(self, dtype):
        """The same numbers in one dtype, as leaves."""
        tensors = {
            name: None if tensor is None else tensor.detach().to(dtype).requires_grad_()
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, W=self.W.to(dtype), dy=self.dy.to(dtype), autocast=None, cache=None)


def make_case(
    tokens=(3, 5),
    in_features=24,
    out_features=40,
    rank=3,
    dtype=torch.float32,
    adapter_dtype=None,
    device="cpu",
    bias=False,
    lora_bias=False,
    plain=False,
    autocast=None,
    transposed=False,
    scaling=0.75,
    seed=0,
):
    """A case with entries of the sizes that training meets: W x near one, the branch a fraction of it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, kind=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(kind).to(device)

    adapter_dtype = adapter_dtype or dtype
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    W = draw(*shape, scale=in_features**-0.5)
    W = W.t() if transposed else W
    A = draw(rank, in_features, scale=in_features**-0.5, kind=adapter_dtype)
    B = draw(out_features, rank, scale=0.5 * rank**-0.5, kind=adapter_dtype)
    magnitude = None
    if not plain:
        norm = row_norm(DenseWeight(W.double()), A.double(), B.double(), scaling)
        magnitude = (norm * (1 + 0.1 * draw(out_features, kind=torch.float64))).to(adapter_dtype)
    case = {
        "x": draw(*tokens, in_features),
        "A": A,
        "B": B,
        "magnitude": magnitude,
        "lora_bias": draw(out_features, scale=0.1, kind=adapter_dtype) if lora_bias else None,
        "bias": draw(out_features) if bias else None,
    }
    tensors = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in case.items()}
    return Case(tensors, W, scaling, draw(*tokens, out_features, kind=autocast or dtype), autocast)


def quantised(kind, out, features, device, nested=True, blocksize=64, dtype=torch.float32):
    """A bitsandbytes weight of `kind` ("nf4", "fp4" or "int8") with one row far larger than the others."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(out, features, generator=generator) * features**-0.5
    data[0] *= 30
    data = data.to(dtype)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(features, out, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(data, has_fp16_weights=False, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(features, out, bias=False, compress_statistics=nested, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(
            data, requires_grad=False, compress_statistics=nested, quant_type=kind, blocksize=blocksize
        )
    return find_weight(layer.to(device))


def run(case, function):
    """The output and the gradients of `function(case)`, by name."""
    with case.context():
        y = function(case)
    names = [name for name in NAMES if case.tensors[name] is not None and case.tensors[name].requires_grad]
    grads = torch.autograd.grad(y, [case.tensors[name] for name in names], case.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def reference(case):
    """Plain PyTorch, in whatever dtypes the case has."""
    t = case.tensors
    x, branch = t["x"], t["A"].dtype
    if case.autocast is not None or x.dtype == branch:
        return dora_linear_reference(
            x, case.W, t["A"], t["B"], t["magnitude"], case.scaling, t["bias"], t["lora_bias"]
        ).to(case.autocast or x.dtype)
    v = x @ case.W.T
    low_rank = x.to(branch) @ t["A"].T @ t["B"].T
    v = v + case.scaling * (low_rank if t["lora_bias"] is None else low_rank + t["lora_bias"])
    if t["magnitude"] is not None:
        norm = row_norm(DenseWeight(case.W), t["A"], t["B"], case.scaling)
        v = gain(t["magnitude"], norm) * v
    return (v if t["bias"] is None else v + t["bias"]).to(x.dtype)


def ours(route):
    """`peft.dora.linear` on one body."""

    def function(case):
        t = case.tensors
        return linear(
            t["x"],
            case.weight(),
            t["A"],
            t["B"],
            scaling=case.scaling,
            magnitude=t["magnitude"],
            lora_bias=t["lora_bias"],
            cache=case.cache,
            route=route,
        )

    return function


def distance(result, truth):
    """The error of one tensor: relative in the Frobenius norm, and the largest relative to the largest entry."""
    result, truth = result.double(), truth.double()
    if not torch.isfinite(result).all():
        return float("inf"), float("inf")
    scale = truth.norm().clamp_min(1e-30)
    largest = truth.abs().max().clamp_min(1e-30) if truth.numel() else torch.ones(())
    worst = (result - truth).abs().max() if truth.numel() else torch.zeros(())
    return ((result - truth).norm() / scale).item(), (worst / largest).item()


def check(case, route):
    """Every result of ours is at most twice as far from float64 as plain PyTorch's of the same precision.

    The floor under that: a quarter of a unit in the last place in low precision, where a single result can happen to
    round to the truth, and four units in float32, whose sums PyTorch takes in other orders from size to size.
    """
    truth = run(case.to(torch.float64), reference)
    same = run(case, reference)
    mine = run(case, ours(route))
    precision = case.autocast or case.tensors["x"].dtype
    floor = torch.finfo(precision).eps * (4 if precision in (torch.float32, torch.float64) else 0.25)
    assert mine["y"].dtype == same["y"].dtype and mine["y"].shape == same["y"].shape
    for name, tensor in mine.items():
        limit = zip(distance(tensor, truth[name]), distance(same[name], truth[name]), strict=True)
        for (error, allowed), kind in zip(limit, ("norm", "largest"), strict=True):
            assert error <= 2 * allowed + floor, f"{name}: {kind} error {error:.3g}, PyTorch's {allowed:.3g}"
        if name != "y":
            assert tensor.dtype == case.tensors[name].dtype and tensor.shape == case.tensors[name].shape
