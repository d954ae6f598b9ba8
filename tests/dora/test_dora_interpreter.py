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

# As many as there are now, with room for some that need what is not installed.
AT_LEAST = 150


@pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")
@pytest.mark.skipif(interpreting(), reason="the interpreter runs already")
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "interpreter"]
    command += ["--deselect", f"{Path(__file__).name}::test_kernels_in_the_interpreter", str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= AT_LEAST, done.stdout[-500:]
