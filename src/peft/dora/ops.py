# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The operators that compilers see, with schema, fake, bodies and autograd link: `peft_dora::row_norm`. Everything else
in a compiled layer is torch's own, for Inductor to fuse."""

from __future__ import annotations

from typing import Any

import torch

from .eager import DenseWeight
from .norm import row_norm as row_norm_of
from .route import Route


@torch.library.custom_op("peft_dora::row_norm", mutates_args=())
def row_norm(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, triton: bool) -> torch.Tensor:
    """‖W + s·BA‖ by rows of a dense W, as `peft.dora.row_norm`; a constant for the gradient.

    Args:
        W: `[out, in]`, any layout.
        A: `[r, in]`.
        B: `[out, r]`.
        scaling: s.
        triton: Whether a kernel computes it.

    Returns:
        `[out]`, float32 or float64.

    Raises:
        ValueError: The shapes do not fit.
    """
    route = Route("triton", "compiled") if triton else None
    return row_norm_of(DenseWeight(W), A, B, scaling, route=route)


@row_norm.register_fake
def _(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, triton: bool) -> torch.Tensor:
    wide = torch.float64 if torch.float64 in (W.dtype, A.dtype, B.dtype) else torch.float32
    return A.new_empty(W.shape[0], dtype=wide)


def _no_gradient(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    return None, None, None, None, None


row_norm.register_autograd(_no_gradient)
