# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The Triton bodies. This package is the only importer of triton, and is itself imported by the first call that runs a
kernel."""

from .beside import goes_beside, unpack_beside
from .captured import expire_captured
from .compose import compose, scale_gradient
from .packed4 import dequantise_packed4
from .packed8 import dequantise_packed8
from .packed_groups import dequantise_groups
from .refresh import Batch, Member, kind_of, row_norm
from .row_norm import GROUPED, source_of
from .small_batch import MOST_TOKENS, is_small, small_batch
from .whole import most_whole, whole_bwd, whole_fwd

__all__ = [
    "MOST_TOKENS",
    "Batch",
    "Member",
    "compose",
    "dequantise",
    "expire_captured",
    "goes_beside",
    "is_small",
    "kind_of",
    "most_whole",
    "row_norm",
    "row_parts",
    "scale_gradient",
    "small_batch",
    "source_of",
    "unpack_beside",
    "whole_bwd",
    "whole_fwd",
]

PART_BYTES = 256 * 2**20  # larger products take no longer in parts of this size


def dequantise(packed, dtype, launches=None, rows=None):
    """The matrix `[out, in]` of packed bytes in `dtype`, in one launch.

    Args:
        packed: A `peft.weights.Packed`.
        dtype: float32, float16 or bfloat16.
        launches: Where what was worked out for one weight and dtype is kept.
        rows: The first row and the one after the last, where `row_parts` gave them; None for all.
    """
    if packed.kind in GROUPED:
        return dequantise_groups(packed, dtype, launches, rows)
    if packed.kind == "int8":
        return dequantise_packed8(packed, dtype, launches, rows)
    return dequantise_packed4(packed, dtype, launches, rows)


def row_parts(packed, dtype):
    """Ranges of rows to dequantise one after the other, so that none takes more than `PART_BYTES`; None for one range.

    Args:
        packed: A `peft.weights.Packed`.
        dtype: That of the dense matrix.
    """
    out_features, in_features = packed.shape
    parts = -(-out_features * in_features * dtype.itemsize // PART_BYTES)
    if parts < 2:
        return None
    multiple = max(128, packed.blocksize or 0)  # rows, so that every part begins with a block
    step = -(-out_features // parts // multiple) * multiple
    return [(first, min(first + step, out_features)) for first in range(0, out_features, step)]
