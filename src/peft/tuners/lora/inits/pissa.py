# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""PiSSA (Meng et al., arXiv 2404.02948): the adapter starts as the principal part of the weight, the base as the rest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from .base_weight import read_matrix, take_out

if TYPE_CHECKING:
    from ..layer.base import LoraLayer

_NITER = re.compile(r"pissa_niter_(\d+)")


def begin_pissa(layer: LoraLayer, name: str, kind: str) -> None:
    """A = √(S/s) Vᵀ and B = U √(S/s) of the r largest singular values S, and W − s·BA as the base weight (section 3).

    Args:
        layer: Layer that owns the adapter.
        name: Adapter to start.
        kind: "pissa" for an exact decomposition, "pissa_niter_N" for a randomised one with N subspace iterations.

    Raises:
        ValueError: `kind` is neither.
    """
    matrix = read_matrix(layer)
    r, scaling = layer.r[name], layer.scaling[name]
    iterations = _NITER.fullmatch(kind)
    if kind == "pissa":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    elif iterations:
        u, s, v = torch.svd_lowrank(matrix, q=min(r, *matrix.shape), niter=int(iterations[1]))
        vt = v.t()
    else:
        raise ValueError(f"init_lora_weights={kind!r}: use 'pissa', or 'pissa_niter_N' with a number N.")
    root = (s[:r] / scaling).sqrt()
    take_out(layer, name, matrix, root[:, None] * vt[:r], u[:, :r] * root)
