# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The benchmark for several GPUs, with tiny models on CPU ranks: its processes work, and sharding leaves losses alone."""

from __future__ import annotations

import importlib
import shutil
import sys
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
def test_two_ranks_have_the_losses_of_one(bench):
    rows = [bench.start("tiny", "dora", world, sys.executable) for world in (1, 2)]
    assert [row["world"] for row in rows] == [1, 2] and len(rows[1]["ranks"]) == 2
    assert rows[1]["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5)


def test_a_rank_that_fails_is_reported(bench, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(bench.MeasurementError, match=r"tiny dora on 2: \[1, 1\]"):
        bench.start("tiny", "dora", 2, sys.executable)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tiny-bf16", "tiny-nf4"])
def test_other_bases(bench, case):
    pytest.importorskip("bitsandbytes")
    alone, both = (bench.start(case, "dora-triton", world, sys.executable) for world in (1, 2))
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-2)
