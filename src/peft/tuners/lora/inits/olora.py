# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""OLoRA (Büyükakyüz, arXiv 2406.01775): the adapter starts with an orthonormal B from the weight's QR decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base_weight import read_matrix, take_out

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


def begin_olora(layer: LoraLayer, name: str) -> None:
    """With W = QR: B the first r columns of Q, A the first r rows of R, and W − s·BA as the base weight."""
    matrix = read_matrix(layer)
    r = layer.r[name]
    q, upper = torch.linalg.qr(matrix)
    take_out(layer, name, matrix, upper[:r], q[:, :r])
