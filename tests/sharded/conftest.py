# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Process groups for the tests of this folder: two and four ranks with gloo, and one rank a GPU with NCCL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


def _serving(world: int, device: str = "cpu") -> Iterator[Ranks]:
    group = Ranks(world, device)
    yield group
    group.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _serving(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _serving(4)


@pytest.fixture(scope="session", params=[1, 2], ids=["one_gpu", "two_gpus"])
def gpus(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Ranks with a GPU each, as many as there are GPUs for; one alone goes through NCCL too."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} CUDA devices")
    yield from _serving(request.param, "cuda")
