# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The kernels in Triton's interpreter, on the CPU: the tests of this folder once more, in a process of their own, because
triton decides when it is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft.dora.route import interpreting, triton_is_installed

HERE = Path(__file__).parent
# The files with tests of a body; this one names it too.
FILES = [
    path.name
    for path in sorted(HERE.glob("test_*.py"))
    if path != Path(__file__) and "(body" in path.read_text("utf-8")
]


@pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")
@pytest.mark.skipif(interpreting(), reason="the interpreter runs already")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "interpreter"]
    done = subprocess.run([*command, str(HERE / file)], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # Skipped are the dtypes that the interpreter lacks, which are fewer than those that it has.
    passed, skipped = (int((re.search(rf"(\d+) {what}", done.stdout) or [0, 0])[1]) for what in ("passed", "skipped"))
    assert passed and 2 * passed >= skipped, done.stdout[-500:]
