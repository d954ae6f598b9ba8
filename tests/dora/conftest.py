# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The bodies that the DoRA tests run on: PyTorch on the CPU and the GPU, the kernels on the GPU or in the interpreter."""

import pytest
import torch
from dora_truth import BODIES

from peft.dora.route import interpreting, triton_is_installed


def pytest_generate_tests(metafunc):
    """A module whose `PARTS` is true runs on the bodies without whole launches too."""
    if "body" in metafunc.fixturenames:
        names = [name for name, body in BODIES.items() if body.whole or getattr(metafunc.module, "PARTS", False)]
        marked = [pytest.param(name, marks=pytest.mark.gpu if BODIES[name].device == "cuda" else ()) for name in names]
        metafunc.parametrize("body", marked, indirect=True)


@pytest.fixture
def body(request, monkeypatch):
    chosen = BODIES[request.param]
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if chosen.name == "triton" and interpreting():
        pytest.skip("TRITON_INTERPRET=1 runs on the CPU")
    if chosen.name == "interpreter" and not (triton_is_installed() and interpreting()):
        pytest.skip("runs with TRITON_INTERPRET=1, from test_dora_interpreter.py")
    if not chosen.whole:
        from peft.dora.kernels import whole

        monkeypatch.setattr(whole, "MOST_WORK", 1)
    return chosen


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is full of NaN, so that what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched, one after the other."""
    from peft.dora.kernels.launch import Launch

    seen, original = [], Launch.__call__

    def launch(self, *tensors):
        seen.append(getattr(self.function, "fn", self.function).__name__)
        original(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    return seen
