# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What a pass multiplies by, adapter by adapter: A and B in the products' dtype, norm and gain. They are brought up to
date for a whole model at once where a pass over it begins, else layer by layer, and the norm is reused for exactly as
long as nothing that it depends on has changed."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import nn

from .norm import check_factors, row_norm, row_norm_torch, runs_triton, traced_norm
from .reference import gain as gain_of
from .route import TRITON_DTYPES, Route, kernels

# |g| below this is lifted to it where g·v is kept in v's place for the magnitude's gradient: v stays readable.
GAIN_FLOOR = 2.0**-64
MOST_MOVES = 4  # of a parameter's memory, until its adapter is left out of the passes over a model


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


class Request(NamedTuple):
    """What a layer asked for: the arguments of `NormCache.factors`, with what the kernels read of its weight."""

    weight: Any
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dtype: torch.dtype
    magnitude: torch.Tensor | None
    floor: bool
    norm: bool
    key: tuple
    packed: Any
    member: Any

    def repeats(
        self, weight: Any, A: Any, B: Any, scaling: float, dtype: Any, magnitude: Any, floor: bool, norm: bool
    ) -> bool:
        """Whether the same is asked for again, of the same objects."""
        return (
            self.A is A
            and self.B is B
            and self.magnitude is magnitude
            and self.weight is weight
            and self.scaling == scaling
            and self.dtype is dtype
            and self.floor is floor
            and self.norm is norm
        )


class HostState(NamedTuple):
    """The PyTorch body's memory of the last pass: what the host compares, the factors' values, and their norm."""

    key: tuple
    a: torch.Tensor
    b: torch.Tensor
    norm: torch.Tensor


class NormCache:
    """The norm of one adapter on one layer, kept for as long as A, B, W and the scaling are what they were.

    Optimizers that write parameters through raw pointers leave no trace but the values, so these are compared at every
    pass: with Triton by a digest on the device, without synchronisation; the PyTorch body compares the values on the
    CPU, and on other devices, where reading the answer would stall, computes the norm anew at every pass that records
    a gradient. W is frozen; its `key()` tells when it was replaced or written to through torch (otherwise:
    `peft.dora.invalidate`).

    Each pass gets tensors of its own, which are never written to again, so a backward pass finds what its forward pass
    used, whatever was done to the parameters in between. Copies and pickles of a cache are empty; it holds nothing
    that belongs into a state dict.
    """

    __slots__ = ("__weakref__", "_lock", "batch", "call", "moves", "request", "shared", "state")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.state: HostState | None = None
        self.batch: Any = None
        self.call: Any = None
        self.request: Request | None = None
        self.shared: tuple[Any, int] | None = None  # the `passes.Chunk` that it is in, and where
        self.moves = 0

    def __deepcopy__(self, memo: dict) -> NormCache:
        return NormCache()

    def __copy__(self) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple:
        return NormCache, ()

    def __repr__(self) -> str:
        return f"NormCache({'empty' if self.state is None and self.batch is None else 'filled'})"

    def invalidate(self) -> None:
        """Forget everything: the next pass computes the norm anew."""
        with self._lock:
            self.state = self.batch = None
        self.rest()

    def rest(self) -> None:
        """Take no part in the passes of a model any more until a layer asks again: its adapter was switched off, say."""
        if self.request is not None:
            self.request = self.shared = None
            self.moves = 0
            requests.number += 1

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
        triton = dtype in TRITON_DTYPES and runs_triton(route, A, weight.dtype)
        if (
            torch.compiler.is_compiling()
        ):  # the graph computes it at every pass: what a trace keeps is seen by no other
            return traced_norm(weight, A, B, scaling, triton)
        if torch._C._are_functorch_transforms_active():  # tensors without an address
            return row_norm(weight, A, B, scaling)
        return self.factors(weight, A, B, scaling, dtype, triton=triton).stats[0]

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
        norm: bool = True,
    ) -> Factors:
        """A and B in `dtype`, with the norm and the gain for one pass.

        Args:
            weight, A, B, scaling: As in `get`.
            dtype: What the products of the branch compute in; the norm is that of the weight with A and B so rounded.
            triton: Let the kernels compute it.
            magnitude: m, `out` elements; None where no gain is wanted.
            floor: Lift gains smaller than `GAIN_FLOOR` to it.
            norm: False for plain LoRA, which needs neither norm nor gain.

        Raises:
            ValueError: The shapes do not fit.
        """
        asked = self.request
        if triton and asked is not None and asked.repeats(weight, A, B, scaling, dtype, magnitude, floor, norm):
            if self.shared is not None:
                found = self.shared[0].take(self.shared[1])
                if found is not None:
                    return found
        else:
            check_factors(weight, A, B)
        with self._lock, torch.no_grad():
            if triton:
                found = self._refresh_triton(weight, A, B, scaling, dtype, magnitude, floor, norm)
                if found is not None:
                    return found
            return self._refresh_torch(weight, A, B, scaling, dtype, magnitude, floor, norm)

    def _refresh_triton(
        self, weight: Any, A: Any, B: Any, scaling: float, dtype: Any, magnitude: Any, floor: bool, norm: bool
    ) -> Factors | None:
        """The kernels' body of `factors`; the lock is held. None where no kernel reads the weight's format."""
        packed = weight.packed()
        source = kernels().source_of(weight, packed) if norm else None
        if norm and source is None:
            return None
        key = weight.key()
        member = make_member(source, A, B, magnitude, scaling)
        kind = kernels().kind_of(member, dtype)
        batch, asked = self.batch, self.request
        if asked is not None and asked.key != key:
            expire_captured()
        stands = asked is not None and asked.key == key and asked.member.scaling == scaling
        if batch is None or batch.kind != kind or batch.shapes != kernels().Batch.shapes_of([member]):
            batch = self.batch = kernels().Batch([member], dtype)
        elif not stands:
            batch.forget()
        batch.move([member], GAIN_FLOOR if floor else 0.0)
        if getattr(weight, "comes_and_goes", False):
            # Its shards may have been written to, which leaves no trace: nothing is kept for the next pass.
            self.rest()
            return factors_of(batch.refresh(keep=False), 0, member, packed)
        repeats = stands and asked.repeats(weight, A, B, scaling, dtype, magnitude, floor, norm)
        if not repeats or addresses_of([asked.member]) != addresses_of([member]):
            self._ask(Request(weight, A, B, scaling, dtype, magnitude, floor, norm, key, packed, member), repeats)
        return factors_of(batch.refresh(), 0, member, packed)

    def _ask(self, request: Request, moved: bool) -> None:
        """Note what is asked for, so that the next pass over the model has it ready.

        What lies elsewhere at every pass is better asked for layer by layer.
        """
        self.request, self.shared = request, None
        self.moves += moved
        if self.moves <= MOST_MOVES and is_steady(request):
            requests.number += 1

    def _refresh_torch(
        self, weight: Any, A: Any, B: Any, scaling: float, dtype: Any, magnitude: Any, floor: bool, norm: bool
    ) -> Factors:
        """The PyTorch body of `factors`; the lock is held."""
        A, B, magnitude = A.detach(), B.detach(), None if magnitude is None else magnitude.detach()
        a, b = A.to(dtype), B.to(dtype)
        if not norm or not _may_compare(a):
            stats = _stats(row_norm_torch(weight, a, b, scaling), magnitude, floor) if norm else None
            self.state = None
            return Factors(a, b, stats, private=a is not A and b is not B)
        key = (scaling, weight.key(), A.shape, B.shape, dtype, A.device)
        state = self.state
        if state is None or state.key != key or _is_unusable(state.norm) or not _equal(state, a, b):
            a, b = (a.clone() if a is A else a), (b.clone() if b is B else b)
            state = self.state = HostState(key, a, b, row_norm_torch(weight, a, b, scaling))
        return Factors(state.a, state.b, _stats(state.norm, magnitude, floor), private=True)


def expire_captured() -> None:
    """Let the next replay of every captured pass compute its norms."""
    if kernels.cache_info().currsize:  # else no kernel ever ran
        kernels().expire_captured()


class Requests:
    """How many new requests there have been: while the number stands, every model's batches are as they were."""

    number = 0


requests = Requests()


def factors_of(done: Any, i: int, member: Any, packed: Any) -> Factors:
    """The factors of member `i` of a batch that was brought up to date."""
    copies, stats = done.copies, None if done.stats is None else done.stats[i]
    if copies is None:
        return Factors(member.a, member.b, stats, False, packed)
    return Factors(copies[2 * i], copies[2 * i + 1], stats, True, packed)


def make_member(source: Any, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor | None, scaling: float) -> Any:
    """A `kernels.Member` of parameters that may have two dtypes or be no contiguous blocks.

    Raises:
        RuntimeError: They are on several devices: the kernels, which are given addresses, would not find that out.
    """
    others = (B, magnitude, *(() if source is None else source.pointers))
    if any(tensor is not None and tensor.device != A.device for tensor in others):
        raise RuntimeError(f"expected A, B, the magnitude and the weight on one device, A is on {A.device}")
    wide = torch.promote_types(A.dtype, B.dtype)
    a, b = (factor.detach().to(wide).contiguous() for factor in (A, B))
    return kernels().Member(source, a, b, None if magnitude is None else magnitude.detach().contiguous(), scaling)


def _may_compare(a: torch.Tensor) -> bool:
    """Whether the host may wait for a comparison: on the CPU always, elsewhere where no gradient is recorded; never where
    there are no values, as on the meta device and under `FakeTensorMode`."""
    if type(a) is not torch.Tensor or a.is_meta:
        return False
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


def is_steady(request: Request) -> bool:
    """Whether the kernels read the very parameters and the very weight, not copies that are made for each pass."""
    if getattr(request.weight, "comes_and_goes", False):
        return False
    member = request.member
    pairs = [(member.a, request.A), (member.b, request.B)]
    if request.magnitude is not None:
        pairs.append((member.magnitude, request.magnitude))
    if not all(type(whole) is nn.Parameter and part.data_ptr() == whole.data_ptr() for part, whole in pairs):
        return False
    # A weight that had to be copied into a matrix gives another copy each time.
    read = member.source is not None and request.packed is None
    return not read or member.source.pointers[0].data_ptr() == request.weight.dense().data_ptr()


def addresses_of(members: list[Any]) -> list[int]:
    """Where the parameters of the members are."""
    return [
        0 if tensor is None else tensor.data_ptr()
        for member in members
        for tensor in (member.a, member.b, member.magnitude)
    ]
