# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One small layer for each way in which the kernels are compiled, and those layers once more under compute-sanitizer."""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dora_truth import quantised

import layouts
from peft import dora
from peft.dora.eager import DenseWeight
from peft.dora.route import interpreting
from peft.weights.awq import AwqWeight
from peft.weights.gptq import GptqWeight
from peft.weights.hqq import HqqWeight

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None

# On a GPU outputs and tokens are no multiples of any tile, and take more than one tile each: the last one is where a
# wrong mask reads or writes past an allocation. The interpreter's edges are the business of the other tests.
OUT, IN, TOKENS = (32, 32, 11) if interpreting() else (160, 96, 67)


def plain(device, dtype, features=IN):
    generator = torch.Generator().manual_seed(0)
    return DenseWeight((torch.randn(OUT, features, generator=generator) * features**-0.5).to(dtype).to(device))


def grouped(reader, build, *arguments, **options):
    layer, _ = build((OUT, IN), *arguments, torch.float16, **options)
    return lambda device: reader(layer.to(device))


def hqq(device):
    layer, _ = layouts.hqq((OUT, IN), 4, 32, torch.float16, axis=1)
    layer.meta = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in layer.meta.items()}
    return HqqWeight(layer.to(device))


# name: (weight on a device, dtype of the products, rank, whether magnitude and B's bias are there)
LAYERS = {
    "plain": (lambda device: plain(device, torch.float16), torch.float16, 3, (True, False)),
    "plain in float32": (lambda device: plain(device, torch.float32, 35), torch.float32, 17, (True, True)),
    "by columns": (
        lambda device: DenseWeight(plain(device, torch.float16).matrix.T.contiguous().T), torch.float16, 12, (True, True)
    ),
    "a large rank": (lambda device: plain(device, torch.float16), torch.float16, 80, (True, False)),
    "plain LoRA": (lambda device: plain(device, torch.float16), torch.float16, 8, (False, True)),
    "nf4": (lambda device: quantised("nf4", OUT, IN, device, dtype=torch.float16), torch.float16, 16, (True, False)),
    "nf4, a large rank": (
        lambda device: quantised("nf4", OUT, IN, device, dtype=torch.float16), torch.float16, 40, (True, False)
    ),
    "fp4, odd": (lambda device: quantised("fp4", OUT, 35, device, nested=False), torch.float32, 1, (True, False)),
    "int8": (lambda device: quantised("int8", OUT, IN, device), torch.float16, 5, (True, False)),
    "gptq": (grouped(GptqWeight, layouts.gptq, 3, 32, act_order=True), torch.float16, 5, (True, False)),
    "awq": (grouped(AwqWeight, layouts.awq, 4, 32), torch.float16, 5, (True, False)),
    "hqq": (hqq, torch.float16, 5, (True, False)),
}  # fmt: skip


def three_steps(weight, dtype, rank, parts, route):
    """Output and gradients of a step, of another with the same A and B, and of one with others; and outputs of few tokens
    without gradient."""
    device = weight.dense().device
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, kind=torch.float32):
        return torch.randn(*shape, generator=generator).to(kind).to(device).requires_grad_()

    with_magnitude, with_bias = parts
    out_features, in_features = weight.shape
    x = draw(TOKENS, in_features, kind=dtype)
    A, B = draw(rank, in_features), draw(out_features, rank)
    A.data.mul_(in_features**-0.5)
    magnitude = draw(out_features) if with_magnitude else None
    lora_bias = draw(out_features) if with_bias else None
    leaves = [leaf for leaf in (x, A, B, magnitude, lora_bias) if leaf is not None]
    dy = draw(TOKENS, out_features, kind=dtype).detach()
    cache, results = dora.NormCache(), []
    for scale in (1.0, 1.0, 1.5):
        B.data.mul_(scale)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = dora.linear(
                x, weight, A, B, scaling=0.5, magnitude=magnitude, lora_bias=lora_bias, cache=cache, route=route
            )
            with torch.no_grad():
                few = [
                    dora.linear(
                        x[:tokens], weight, A, B, scaling=0.5, magnitude=magnitude, lora_bias=lora_bias, cache=cache,
                        route=route,
                    )
                    for tokens in (1, 5)
                ]  # fmt: skip
        results += [y.detach(), *torch.autograd.grad(y, leaves, dy), *few]
    return results


def kernels_of_ours():
    """The names of all kernels that anything launches."""
    from peft.dora import kernels
    from peft.dora.kernels.launch import Kernel

    modules = [
        importlib.import_module(found.name) for found in pkgutil.iter_modules(kernels.__path__, "peft.dora.kernels.")
    ]
    found = [value.function for module in modules for value in vars(module).values() if isinstance(value, Kernel)]
    return {getattr(function, "fn", function).__name__ for function in found}


def test_layers_launch_every_kernel_and_give_what_pytorch_gives(body, launches):
    if body.route.path != "triton":
        pytest.skip("for kernels")
    for name, (build, dtype, rank, parts) in LAYERS.items():
        weight = build(body.device)
        found = three_steps(weight, dtype, rank, parts, body.route)
        expected = three_steps(weight, dtype, rank, parts, dora.Route("torch", "to compare with"))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            scale = other.abs().max().item()
            torch.testing.assert_close(
                one, other, rtol=tolerance, atol=tolerance * scale, msg=lambda text, at=(name, i): f"{at}: {text}"
            )
    assert set(launches) == kernels_of_ours()


def sanitized(tool, test):
    """What compute-sanitizer says of this file's `test` on the kernels, and its exit code.

    Each tensor is an allocation of its own, of its exact size.
    """
    command = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if command is None:
        pytest.skip("compute-sanitizer is not installed")
    options = ["--tool", tool, "--target-processes", "application-only", "--report-api-errors", "no"]
    options += ["--error-exitcode", "99"]
    for part in ("dequantise", "beside4", "_fwd_kernel", "_bwd_kernel", "write_past"):  # of the names of our kernels
        options += ["--kernel-name", f"kernel_substring={part}"]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"{test} and triton", __file__]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [command, *options, *tests], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    return done.stdout + done.stderr, done.returncode


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean_under(tool):
    said, code = sanitized(tool, "every_kernel")
    assert code == 0, said[-6000:]
    assert re.search(r"\b1 passed", said), said[-500:]
    assert re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", said), said[-500:]


@pytest.mark.gpu
def test_memcheck_sees_a_planted_error():
    said, code = sanitized("memcheck", "planted")
    assert code == 99 and "Invalid __global__ write" in said, said[-3000:]
    assert "write_past_the_end" in said


def write_past_the_end(x_ptr, size):
    tl.store(x_ptr + size, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif("PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ, reason="writes past the end of its memory")
def test_planted(body):
    if body.name != "triton":
        pytest.skip("for the sanitizer")
    x = torch.zeros(64, device=body.device)
    triton.jit(write_past_the_end)[(1,)](x, 64)
    torch.cuda.synchronize()
