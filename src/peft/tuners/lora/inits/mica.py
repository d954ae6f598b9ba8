# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MiCA: B is frozen to the weight's minor left singular vectors, A starts at zero and is all that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base_weight import read_matrix, set_factors

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


def begin_mica(layer: LoraLayer, name: str) -> None:
    """A = 0 and B `[out, r]` the left singular vectors of the r smallest singular values.

    Raises:
        ValueError: The weight has fewer than r singular values.
    """
    matrix = read_matrix(layer)
    r = layer.r[name]
    if r > min(matrix.shape):
        raise ValueError(
            f"init_lora_weights='mica' needs r singular vectors: r={r} is more than the {min(matrix.shape)} of a weight "
            f"{list(matrix.shape)}. Lower r, for this layer alone by rank_pattern."
        )
    u = torch.linalg.svd(matrix, full_matrices=False)[0]
    set_factors(layer, name, matrix.new_zeros(r, matrix.shape[1]), u[:, -r:])
