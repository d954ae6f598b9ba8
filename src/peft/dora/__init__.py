# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""DoRA (Liu et al., arXiv 2402.09353) as pure functions with three bodies: the definition, PyTorch, Triton. Importing
it needs torch alone; triton is imported by the first call that runs a kernel."""

from __future__ import annotations

from torch import nn

from .autograd import linear
from .factors import NormCache, expire_captured
from .finite import check_finite
from .norm import row_norm
from .passes import begin_pass, caches_of, end_pass, unwatch_passes, watch_passes
from .pieces import branch, compose
from .reference import dora_linear_reference, gain, weight_norm
from .route import Route, explain, plan
from .stacked import stacked_norm, stacked_weight

__all__ = [
    "NormCache",
    "Route",
    "begin_pass",
    "branch",
    "check_finite",
    "compose",
    "dora_linear_reference",
    "end_pass",
    "explain",
    "gain",
    "invalidate",
    "linear",
    "plan",
    "row_norm",
    "stacked_norm",
    "stacked_weight",
    "unwatch_passes",
    "watch_passes",
    "weight_norm",
]


def invalidate(model: nn.Module) -> None:
    """Let every layer compute its norm anew at the next pass; for whoever writes to base weights behind torch's back.

    Captured graphs do so at their next replay, those of other models too.

    Args:
        model: Any module; layers are found by their method `dora_caches`, which gives their `NormCache` objects.
    """
    for cache in caches_of(model):
        cache.invalidate()
    expire_captured()
