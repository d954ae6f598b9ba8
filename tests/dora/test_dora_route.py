# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which body runs is decided for a reason, said once, and triton is imported only where it is needed."""

import subprocess
import sys
import warnings

import pytest
import torch

from peft import dora
from peft.dora import route as route_module
from peft.dora.route import Route


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(route_module, "_warned", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(route_module, "triton_is_installed", lambda: True)


def plan(device="cuda", dtype=torch.float32, want_triton=True, kind="linear"):
    return dora.plan(device=device, dtype=dtype, want_triton=want_triton, kind=kind)


def test_a_gpu_runs_the_kernels():
    assert plan() == Route("triton", "kernels on cuda")
    assert plan(dtype=torch.float16, kind="conv").path == "triton"
    assert plan(kind="embedding").path == "triton"


def test_without_the_option_pytorch_runs_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(device="cpu", want_triton=False) == Route("torch", "use_dora_triton is off")


OBSTACLES = {
    "the kernels need a GPU of CUDA or ROCm, the layer is on cpu": {"device": "cpu"},
    "the kernels need a GPU of CUDA or ROCm, the layer is on mps": {"device": "mps"},
    "the kernels need a GPU of CUDA or ROCm, the layer is on xpu": {"device": "xpu"},
    "the kernels compute in float32, float16 and bfloat16, not in float64": {"dtype": torch.float64},
    "there are no kernels for a layer of kind 'attention'": {"kind": "attention"},
}


@pytest.mark.works_with("torch", "CPU, MPS and XPU: DoRA in PyTorch, with the reason")
@pytest.mark.parametrize("reason", OBSTACLES)
def test_one_warning_a_reason(reason):
    with pytest.warns(UserWarning, match="DoRA runs in PyTorch") as caught:
        for _ in range(3):
            assert plan(**OBSTACLES[reason]) == Route("torch", reason)
    assert len(caught) == 1 and reason in str(caught[0].message)
    assert type(caught[0].message).__name__ == "PeftWarning"


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(route_module, "triton_is_installed", lambda: False)
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert plan().path == "torch"


def test_old_gpus_have_no_bfloat16(monkeypatch):
    monkeypatch.setattr(route_module, "_has_bfloat16", lambda index: False)
    with pytest.warns(UserWarning, match="no bfloat16"):
        assert plan(dtype=torch.bfloat16).path == "torch"
    assert plan(dtype=torch.float16).path == "triton"


def test_the_interpreter_runs_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert plan(device="cpu").path == "triton"
    with pytest.warns(UserWarning, match="TRITON_INTERPRET=1 runs on the CPU"):
        assert plan(device="cuda").path == "torch"


def test_explain(capsys):
    class Layer(torch.nn.Module):
        def dora_routes(self):
            return {"default": Route("triton", "kernels on cuda"), "other": Route("torch", "use_dora_triton is off")}

    model = torch.nn.Sequential(torch.nn.Identity(), Layer())
    text = dora.explain(model)
    assert text.splitlines() == [
        "1 [default]: triton (kernels on cuda)",
        "1 [other]: torch (use_dora_triton is off)",
    ]
    assert capsys.readouterr().out == text + "\n"
    assert dora.explain(torch.nn.Linear(2, 2)) == "no DoRA layer found"


def test_a_tensor_that_moved_since_the_plan_runs_in_pytorch():
    """A route planned on the GPU, met on the CPU: the result is right, and triton stays out."""
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from peft import dora\n"
        "from peft.dora.eager import DenseWeight\n"
        "before = before or 'triton' in sys.modules\n"
        "A, B, m = torch.ones(2, 3), torch.ones(4, 2), torch.ones(4)\n"
        "x = torch.ones(5, 3, requires_grad=True)\n"
        "y = dora.linear(x, DenseWeight(torch.ones(4, 3)), A, B, scaling=1.0, magnitude=m, cache=dora.NormCache(),\n"
        "                route=dora.Route('triton', 'planned elsewhere'))\n"
        "y.sum().backward()\n"
        "torch.testing.assert_close(y, torch.full((5, 4), 3**0.5))\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
