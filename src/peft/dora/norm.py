# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The norm ‖W + s·BA‖ by rows, computed in chunks without ever building BA."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .products import autocast_dtype
from .route import TRITON_DTYPES, Route, interpreting, kernels

CHUNK_BYTES = 64 * 2**20
HOST_CHUNK_BYTES = 16 * 2**20  # on a CPU, so that a chunk's sum is still in its caches when it is squared


def row_norm(
    weight: Any, A: torch.Tensor, B: torch.Tensor, scaling: float, *, route: Route | None = None
) -> torch.Tensor:
    """‖W + s·BA‖ of each row, without gradient.

    Sums are in float32 (float64 if W, A or B is); products of float32 factors never use TF32.

    Args:
        weight: The base weight W `[out, in]`, a `peft.weights.BaseWeight` or whatever quacks like one.
        A: `[r, in]`.
        B: `[out, r]`.
        scaling: s.
        route: Which body computes it; None for PyTorch.

    Returns:
        `[out]`, float32 or float64.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_factors(weight, A, B)
    a, b = A.detach(), B.detach()
    if a.dtype != b.dtype:
        a, b = a.to(wide := torch.promote_types(a.dtype, b.dtype)), b.to(wide)
    if runs_triton(route, a, weight.dtype):
        source = kernels().source_of(weight, weight.packed())
        if source is not None:
            return kernels().row_norm(source, a, b, scaling)
    return row_norm_torch(weight, a, b, scaling)


def traced_norm(weight: Any, A: torch.Tensor, B: torch.Tensor, scaling: float, triton: bool) -> torch.Tensor:
    """`row_norm` as one operator of a compiler's graph, on the dense weight."""
    from . import ops

    return ops.row_norm(weight.dense(), A.detach(), B.detach(), scaling, triton)


def check_factors(weight: Any, A: torch.Tensor, B: torch.Tensor) -> None:
    """Raise a ValueError where `A [r, in]` and `B [out, r]` do not fit `weight [out, in]`."""
    out, features = weight.shape
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != features or B.shape[0] != out or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of shape ({out}, {features}): expected "
            f"A [r, {features}] and B [{out}, r]"
        )


def runs_triton(route: Route | None, factor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can take what the route promised: the tensors may have moved since it was planned."""
    if route is None or route.path != "triton" or factor.dtype not in TRITON_DTYPES or dtype not in TRITON_DTYPES:
        return False
    return factor.device.type == "cuda" or interpreting()


def row_norm_torch(weight: Any, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The PyTorch body of `row_norm`: chunks of rows, of at most 64 MiB (on a CPU 16) all temporaries together.

    Args:
        weight: As there.
        a, b: A and B in one dtype.
        scaling: s.
    """
    pieces = getattr(weight, "pieces", None)
    if pieces is not None:
        return _row_norm_of_pieces(weight, pieces(), a, b, scaling)
    out, features = weight.shape
    wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype) else torch.float32
    # At most four matrices of a chunk live together: W as stored and in the wide dtype, the product, the sum.
    most = min(CHUNK_BYTES, HOST_CHUNK_BYTES) if a.device.type == "cpu" else CHUNK_BYTES
    rows = max(1, most // (4 * wide.itemsize * max(features, 1)))
    # The sum's room is kept from chunk to chunk, but where reading a chunk takes more of it.
    keeps = getattr(weight, "format", None) == "plain" and type(a) is torch.Tensor
    keeps = keeps and not torch._C._are_functorch_transforms_active()
    room, norms = None, []
    with _exact_products(a.device.type):
        if not _has_wide_product(a):
            a, b = a.to(wide), b.to(wide)
        for start in range(0, out, rows):
            stop = min(start + rows, out)
            base = weight.rows(start, stop, wide).detach()
            if a.dtype == wide:
                into = None if room is None else room[: stop - start]
                total = torch.addmm(base, b[start:stop], a, alpha=scaling, out=into)
                room = total if keeps and room is None else room  # no chunk that follows is larger
            else:
                total = torch.mm(b[start:stop], a, out_dtype=wide).mul_(scaling).add_(base)
            norms.append(torch.linalg.vector_norm(total, dim=1))
            del base, total  # before the next chunk is read
    return torch.cat(norms) if norms else torch.empty(0, dtype=wide, device=a.device)


def _row_norm_of_pieces(
    weight: Any, pieces: list[Any], a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The norm of a weight that is spread over processes: each squares its own blocks, and the squares are reduced."""
    wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype) else torch.float32
    squares = torch.zeros(weight.shape[0], dtype=wide, device=a.device)
    for piece in pieces:
        (row, column), (rows, columns) = (piece.row, piece.column), piece.shape
        norms = row_norm_torch(piece.on(a.device), a[:, column : column + columns], b[row : row + rows], scaling)
        squares[row : row + rows] += norms.square_()
    return weight.sum(squares).sqrt_()


def _has_wide_product(a: torch.Tensor) -> bool:
    """Whether a product of a's dtype can be had in float32 without rounding in between."""
    return a.dtype in (torch.float16, torch.bfloat16) and a.device.type == "cuda" and torch.version.hip is None


_PRECISION_LOCK = threading.Lock()


@contextlib.contextmanager
def _exact_products(device_type: str) -> Iterator[None]:
    """Autocast off, and products of float32 in float32, whatever the global switches for TF32 and bf16 say."""
    with contextlib.ExitStack() as stack:
        if autocast_dtype(device_type) is not None:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        switches = [
            (switch, switch.fp32_precision)
            for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
            if switch.fp32_precision not in ("ieee", "none")
        ]
        if switches:
            stack.enter_context(_PRECISION_LOCK)
        for switch, value in switches:
            stack.callback(setattr, switch, "fp32_precision", value)
            switch.fp32_precision = "ieee"
        yield
