# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The norm ‖W + s·BA‖ by rows: computed in chunks without ever building BA, and reused for exactly as long as
nothing that it depends on has changed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .reference import gain as gain_of
from .route import TRITON_DEVICES, TRITON_DTYPES, Route, interpreting, kernels

CHUNK_BYTES = 64 * 2**20

# |g| below this is lifted to it where g·v is kept in v's place for the magnitude's gradient: v stays readable.
GAIN_FLOOR = 2.0**-64


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
    return factor.device.type in TRITON_DEVICES or interpreting()


def row_norm_torch(weight: Any, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The PyTorch body of `row_norm`: chunks of rows, of at most 64 MiB all temporaries together.

    Args:
        weight: As there.
        a, b: A and B in one dtype.
        scaling: s.
    """
    out, features = weight.shape
    wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype) else torch.float32
    # At most four matrices of a chunk live together: W as stored and in the wide dtype, the product, the sum.
    rows = max(1, CHUNK_BYTES // (4 * wide.itemsize * max(features, 1)))
    norms = []
    with _exact_products(a.device.type):
        if not _has_wide_product(a):
            a, b = a.to(wide), b.to(wide)
        for start in range(0, out, rows):
            stop = min(start + rows, out)
            base = weight.rows(start, stop, wide)
            if a.dtype == wide:
                total = torch.addmm(base, b[start:stop], a, alpha=scaling)
            else:
                total = torch.mm(b[start:stop], a, out_dtype=wide).mul_(scaling).add_(base)
            norms.append(torch.linalg.vector_norm(total, dim=1))
    return torch.cat(norms) if norms else torch.empty(0, dtype=wide, device=a.device)


def _has_wide_product(a: torch.Tensor) -> bool:
    """Whether a product of a's dtype can be had in float32 without rounding in between."""
    return a.dtype in (torch.float16, torch.bfloat16) and a.device.type == "cuda" and torch.version.hip is None


_PRECISION_LOCK = threading.Lock()


@contextlib.contextmanager
def _exact_products(device_type: str) -> Iterator[None]:
    """Autocast off, and products of float32 in float32, whatever the global switches for TF32 and bf16 say."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
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


class Factors(NamedTuple):
    """What one pass multiplies by.

    Args:
        a, b: A `[r, in]` and B `[out, r]` in the dtype of the branch. Nobody writes to them again, except where
            they are the parameters themselves (`private` is False).
        stats: The norm and, where a magnitude was given, the gain: `[1 or 2, out]`, float32 or float64. None for
            plain LoRA.
        private: Whether a and b are copies.
        packed: The weight's stored bytes for kernels, None where they are not wanted or there are none.
    """

    a: torch.Tensor
    b: torch.Tensor
    stats: torch.Tensor | None
    private: bool
    packed: Any = None


class HostState(NamedTuple):
    """The PyTorch body's memory of the last pass: what the host compares, the factors' values, and their norm."""

    key: tuple
    a: torch.Tensor
    b: torch.Tensor
    norm: torch.Tensor


class NormCache:
    """The norm of one adapter on one layer, kept for as long as A, B, W and the scaling are what they were.

    Beside the norm it keeps the values of A and B that the norm was computed from, in the dtype that the products use,
    and compares them at every pass: optimizers that write parameters through raw pointers leave no other trace. W is
    frozen; its `key()` tells when it was replaced or written to through torch (otherwise: `peft.dora.invalidate`).

    Each pass gets tensors of its own, which are never written to again, so a backward pass finds what its forward pass
    used, whatever was done to the parameters in between.

    With Triton the comparison is made on the device, without synchronisation. The PyTorch body compares on the CPU; on
    other devices, where reading the answer would stall, it computes the norm anew at every pass that records a
    gradient. Copies and pickles of a cache are empty; it holds nothing that belongs into a state dict.
    """

    __slots__ = ("_lock", "state")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.state: Any = None

    def __deepcopy__(self, memo: dict) -> NormCache:
        return NormCache()

    def __copy__(self) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple:
        return NormCache, ()

    def __repr__(self) -> str:
        return f"NormCache({'empty' if self.state is None else 'filled'})"

    def invalidate(self) -> None:
        """Forget everything: the next pass computes the norm anew."""
        with self._lock:
            self.state = None

    def get(
        self, weight: Any, A: torch.Tensor, B: torch.Tensor, scaling: float, route: Route | None = None
    ) -> torch.Tensor:
        """The norm `[out]`, float32 (float64 if W, A or B is), as `row_norm` computes it.

        Args:
            weight: The base weight `[out, in]`.
            A: `[r, in]`.
            B: `[out, r]`.
            scaling: s.
            route: Which body computes it; None for PyTorch.

        Raises:
            ValueError: The shapes do not fit.
        """
        dtype = torch.promote_types(A.dtype, B.dtype)
        return self.factors(weight, A, B, scaling, dtype, triton=_route_holds(route, A, dtype, weight)).stats[0]

    def factors(
        self,
        weight: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
        *,
        triton: bool = False,
        magnitude: torch.Tensor | None = None,
        floor: bool = False,
    ) -> Factors:
        """A and B in `dtype`, with the norm and the gain for one pass.

        Args:
            weight, A, B, scaling: As in `get`.
            dtype: What the products of the branch compute in; the norm is that of the weight with A and B so rounded.
            triton: Let the kernels compute it.
            magnitude: m, `out` elements; None where no gain is wanted.
            floor: Lift gains smaller than `GAIN_FLOOR` to it.
        """
        check_factors(weight, A, B)
        A, B, magnitude = A.detach(), B.detach(), None if magnitude is None else magnitude.detach()
        key = (scaling, weight.key(), A.shape, B.shape, dtype, A.device, triton)
        with self._lock:
            packed = weight.packed() if triton else None
            source = kernels().source_of(weight, packed) if triton else None
            if source is None:  # also where no kernel reads the weight's format
                return self._refresh_torch(key, weight, A, B, scaling, dtype, magnitude, floor)
            least = GAIN_FLOOR if floor else 0.0
            found = kernels().refresh(self.state, key, source, A, B, scaling, dtype, magnitude, least)
            if found.state is not None:
                self.state = found.state
        return Factors(found.a, found.b, found.stats, private=True, packed=packed)

    def _refresh_torch(
        self,
        key: tuple,
        weight: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
        magnitude: torch.Tensor | None,
        floor: bool,
    ) -> Factors:
        """The PyTorch body of `factors`; the lock is held."""
        a, b = A.to(dtype), B.to(dtype)
        if not _may_compare(a):
            norm = row_norm_torch(weight, a, b, scaling)
            self.state = None
            return Factors(a, b, _stats(norm, magnitude, floor), private=a is not A and b is not B)
        state = self.state
        if state is None or state.key != key or _is_unusable(state.norm) or not _equal(state, a, b):
            a, b = (a.clone() if a is A else a), (b.clone() if b is B else b)
            state = self.state = HostState(key, a, b, row_norm_torch(weight, a, b, scaling))
        return Factors(state.a, state.b, _stats(state.norm, magnitude, floor), private=True)


def _route_holds(route: Route | None, A: torch.Tensor, dtype: torch.dtype, weight: Any) -> bool:
    return dtype in TRITON_DTYPES and runs_triton(route, A, weight.dtype)


def _may_compare(a: torch.Tensor) -> bool:
    """Whether the host may wait for a comparison: on the CPU always, elsewhere where no gradient is recorded."""
    if a.device.type == "cpu":
        return True
    if torch.is_grad_enabled():
        return False
    return a.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _is_unusable(norm: torch.Tensor) -> bool:
    """Autograd refuses to save a tensor that was made in inference mode."""
    return norm.is_inference() and not torch.is_inference_mode_enabled()


def _equal(state: HostState, a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(state.a, a) and torch.equal(state.b, b)


def _stats(norm: torch.Tensor, magnitude: torch.Tensor | None, floor: bool) -> torch.Tensor:
    """The norm and the gain in two rows; the norm alone in one where there is no magnitude."""
    if magnitude is None:
        return norm[None]
    gain = gain_of(magnitude, norm)
    if floor:
        gain = torch.where(gain.abs() < GAIN_FLOOR, GAIN_FLOOR, gain)
    return torch.stack((norm, gain))


def plain_factors(A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> Factors:
    """A and B in `dtype` for a pass that needs no norm."""
    A, B = A.detach(), B.detach()
    a, b = A.to(dtype), B.to(dtype)
    return Factors(a, b, None, private=a is not A and b is not B)
