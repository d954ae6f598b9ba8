# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The benchmark for several GPUs, with tiny models on CPU ranks: its processes work, and sharding leaves losses alone."""

from __future__ import annotations

import importlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("registry", "rows", "run", "measure", "two_gpus")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("two_gpus")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_have_the_losses_of_one(bench, capsys):
    """`--smoke`: all engines that are installed, on dense and packed bases."""
    assert bench.smoke() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " 2 ranks: losses " in line]
    engines = {"fsdp", "ddp", "tp"} | ({"zero3"} if find_spec("deepspeed") else set())
    assert {engine for _, engine, *_ in lines} == engines and len(lines) >= 7


def test_a_row_tells_what_every_rank_measured(bench):
    row = bench.start("tiny", "dora", 2, sys.executable)
    assert row["world"] == 2 and len(row["ranks"]) == 2
    assert all(rank["losses"] == row["losses"] and rank["p50_ms"] <= row["p50_ms"] for rank in row["ranks"])


def test_a_rank_that_fails_is_reported(bench, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(bench.MeasurementError, match=r"tiny dora fsdp on 2: \[1, 1\]"):
        bench.start("tiny", "dora", 2, sys.executable)
