# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Orthogonal start: A and B are random and not zero, yet their product is, so that both get gradients at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base_weight import set_factors

if TYPE_CHECKING:
    from ..layer.base import LoraLayer

_DEVIATION = 0.1


def begin_orthogonal(layer: LoraLayer, name: str) -> None:
    """A from one half of the rows of a random orthogonal matrix `[r, r]`, B from the other half, so that BA = 0.

    Raises:
        ValueError: The rank is odd and has no two halves.
    """
    r = layer.r[name]
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' halves the rank: r={r} must be even.")
    rows = torch.linalg.qr(torch.randn(r, r))[0]
    for_a, for_b = rows[0::2], rows[1::2]  # [r / 2, r] each
    a = for_a.t() @ torch.randn(r // 2, layer.in_features) * _DEVIATION
    b = torch.randn(layer.out_features, r // 2) @ for_b * _DEVIATION
    set_factors(layer, name, a, b)
