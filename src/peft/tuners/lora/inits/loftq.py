# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoftQ (Li et al., arXiv 2310.08659): the base weight is quantised, the adapter starts as the repair of the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.utils.loftq_utils import loftq_init

from .base_weight import read_matrix, set_factors, write_matrix

if TYPE_CHECKING:
    from ..config import LoraConfig
    from ..layer.base import LoraLayer


def begin_loftq(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """Q + s·BA ≈ W (algorithm 1): Q, dequantised again, becomes the base weight.

    Args:
        layer: Layer that owns the adapter.
        name: Adapter to start.
        config: Its settings; `loftq_config` says how many bits and rounds.
    """
    settings = config.loftq_config
    matrix = read_matrix(layer)
    quantised, a, b = loftq_init(
        matrix,
        num_bits=settings.get("loftq_bits", 4),
        reduced_rank=min(layer.r[name], *matrix.shape),
        num_iter=settings.get("loftq_iter", 1),
    )
    root = layer.scaling[name] ** 0.5
    set_factors(layer, name, a / root, b / root)
    write_matrix(layer, quantised)
