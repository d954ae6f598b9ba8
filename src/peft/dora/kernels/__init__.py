# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The Triton bodies. This package is the only importer of triton, and is itself imported by the first call that runs a
kernel."""

from .compose import compose, scale_gradient
from .packed4 import dequantise_packed4
from .packed8 import dequantise_packed8
from .packed_groups import dequantise_groups
from .refresh import Batch, Member, kind_of, row_norm
from .row_norm import GROUPED, source_of

__all__ = ["Batch", "Member", "compose", "dequantise", "kind_of", "row_norm", "scale_gradient", "source_of"]


def dequantise(packed, dtype, launches=None):
    """The matrix `[out, in]` of packed bytes in `dtype`, in one launch.

    Args:
        packed: A `peft.weights.Packed`.
        dtype: float32, float16 or bfloat16.
        launches: Where what was worked out for one weight and dtype is kept.
    """
    if packed.kind in GROUPED:
        return dequantise_groups(packed, dtype)
    return (dequantise_packed8 if packed.kind == "int8" else dequantise_packed4)(packed, dtype, launches)
