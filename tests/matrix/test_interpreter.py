# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A part of the matrix again with the kernels interpreted on the CPU, and what happens where they cannot run at all."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def run_python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=HERE.parents[1],
        env={**inherited, "OMP_NUM_THREADS": "1", **environ},
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_of_the_matrix_under_the_interpreter() -> None:
    result = run_python(
        "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "interpreted",
        str(HERE / "test_matrix.py"), TRITON_INTERPRET="1", PEFT_MATRIX_INTERPRETED="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 40, result.stdout[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


_FALLBACK = """
import logging, warnings
import torch
from torch import nn
from peft import LoraConfig, get_peft_model
import peft.dora

model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    config = LoraConfig(target_modules=["0", "1", "2"], use_dora=True, use_dora_triton=True)
    adapted = get_peft_model(model, config)
    for _ in range(2):
        adapted(torch.randn(2, 8)).sum().backward()
told = [str(warning.message) for warning in seen if "use_dora_triton" in str(warning.message)]
print("WARNINGS", len(told))
print("REASON", told[0] if told else None)
print("EXPLAIN", repr(peft.dora.explain(adapted)))
"""


def test_without_a_gpu_pytorch_runs_and_one_warning_says_why() -> None:
    result = run_python("-c", _FALLBACK, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "WARNINGS 1\n" in result.stdout, result.stdout
    reason = re.search(r"REASON (.*)", result.stdout)[1]
    assert "cpu" in reason.lower(), reason
    explained = re.search(r"EXPLAIN (.*)", result.stdout)[1]
    assert explained.count("torch") >= 3, explained
