# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What a pass multiplies by, adapter by adapter: A and B in the products' dtype, norm and gain. They are brought up to
date for a whole model at once where a pass over it begins, else layer by layer, and the norm is reused for exactly as
long as nothing that it depends on has changed."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from .norm import check_factors, row_norm_torch, runs_triton
from .reference import gain as gain_of
from .route import TRITON_DTYPES, Route, kernels

# |g| below this is lifted to it where g·v is kept in v's place for the magnitude's gradient: v stays readable.
GAIN_FLOOR = 2.0**-64
MOST_MOVES = 4  # of a parameter's memory, until its adapter is left out of the passes over a model
OUTSIDE_BACKWARD = -1  # what torch gives as the number of the backward pass where there is none


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
        self.shared: tuple[DevicePass, int] | None = None
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
            _requests.number += 1

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
        asked = self.request
        kind = kernels().kind_of(member, dtype)
        batch, asked = self.batch, self.request
        stands = asked is not None and asked.key == key and asked.member.scaling == scaling
        if batch is None or not stands or batch.kind != kind or batch.shapes != kernels().Batch.shapes_of([member]):
            batch = self.batch = kernels().Batch([member], dtype)
        batch.move([member], GAIN_FLOOR if floor else 0.0)
        repeats = stands and asked.repeats(weight, A, B, scaling, dtype, magnitude, floor, norm)
        if not repeats or _addresses([asked.member]) != _addresses([member]):
            self._ask(Request(weight, A, B, scaling, dtype, magnitude, floor, norm, key, packed, member), repeats)
        return _factors_of(batch.refresh(), 0, member, packed)

    def _ask(self, request: Request, moved: bool) -> None:
        """Note what is asked for, so that the next pass over the model has it ready.

        What lies elsewhere at every pass (sharded parameters do) is better asked for layer by layer.
        """
        self.request, self.shared = request, None
        self.moves += moved
        if self.moves <= MOST_MOVES and _is_steady(request):
            _requests.number += 1

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


class _Requests:
    """How many new requests there have been: while the number stands, every model's batches are as they were."""

    number = 0


_requests = _Requests()


def _factors_of(done: Any, i: int, member: Any, packed: Any) -> Factors:
    """The factors of member `i` of a batch that was brought up to date."""
    copies, stats = done.copies, None if done.stats is None else done.stats[i]
    if copies is None:
        return Factors(member.a, member.b, stats, False, packed)
    return Factors(copies[2 * i], copies[2 * i + 1], stats, True, packed)


def make_member(source: Any, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor | None, scaling: float) -> Any:
    """A `kernels.Member` of parameters that may have two dtypes or be no contiguous blocks."""
    wide = torch.promote_types(A.dtype, B.dtype)
    a, b = A.detach().to(wide).contiguous(), B.detach().to(wide).contiguous()
    return kernels().Member(source, a, b, None if magnitude is None else magnitude.detach().contiguous(), scaling)


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


class DevicePass:
    """The adapters of one model on one device, whose factors are brought up to date together.

    That is done where a pass over the model begins, and where a backward pass (checkpointing) calls a layer for the first
    time; it holds for that pass alone. Nothing can change the parameters of a layer in between but code that the model
    itself runs.

    Args:
        caches: The adapters' caches, each with its request.
    """

    def __init__(self, caches: list[NormCache]) -> None:
        self.members = [(cache, cache.request) for cache in caches]
        kinds: dict[tuple, list[int]] = {}
        for i, (_, request) in enumerate(self.members):
            kinds.setdefault((kernels().kind_of(request.member, request.dtype), request.floor), []).append(i)
        self.batches = [
            (kernels().Batch([self.members[i][1].member for i in order], self.members[order[0]][1].dtype), order)
            for order in kinds.values()
        ]
        for batch, order in self.batches:
            batch.move(batch.members, GAIN_FLOOR if self.members[order[0]][1].floor else 0.0)
        for i, (cache, _) in enumerate(self.members):
            cache.shared = self, i
        self.watched = [p for _, request in self.members for p in (request.A, request.B, request.magnitude)]
        self.addresses = _addresses([request.member for _, request in self.members])
        self.device = self.members[0][1].A.device
        self.is_open = False  # between the beginning and the end of a pass over the model
        self.release()

    def release(self) -> None:
        """Let go of the tensors: who still needs them holds them."""
        self.factors: list[Factors] | None = None

    def take(self, i: int) -> Factors | None:
        """The factors of member `i`; None where no pass is known to be running, or another graph or stream is."""
        task = torch._C._current_graph_task_id()
        place = _place(self.device)
        if self.factors is None or task != self.task or place != self.place:
            if task == OUTSIDE_BACKWARD and not self.is_open:
                return None
            self.refresh(task, place)
            if self.factors is None:
                return None
        found = self.factors[i]
        if task == OUTSIDE_BACKWARD:
            self.left -= 1
            if (
                not self.left
            ):  # every layer has had its own: with checkpointing nobody needs them until the backward pass
                self.release()
        return found

    def refresh(self, task: int, place: tuple) -> None:
        """Bring all factors up to date for the pass that is running, in two launches a batch."""
        self.release()
        if [0 if p is None else p.data_ptr() for p in self.watched] != self.addresses:
            return
        for _, request in self.members:
            if not request.weight.has_key(request.key):
                return
        factors: list[Any] = [None] * len(self.members)
        with torch.no_grad():
            for batch, order in self.batches:
                done = batch.refresh()
                for place_in_batch, i in enumerate(order):
                    request = self.members[i][1]
                    factors[i] = _factors_of(done, place_in_batch, request.member, request.packed)
        self.factors, self.task, self.place, self.left = factors, task, place, len(factors)
        if task != OUTSIDE_BACKWARD:
            torch.autograd.Variable._execution_engine.queue_callback(self.release)


def _place(device: torch.device) -> tuple:
    """The stream that work goes to, and whether it is being captured into a graph."""
    if device.type != "cuda":
        return ()
    return torch._C._cuda_getCurrentRawStream(device.index), torch._C._cuda_isCurrentStreamCapturing()


class ModelPass:
    """Passes over one model: `begin` and `end` enclose each.

    Args:
        model: Any module; the caches are found by its layers' method `dora_caches`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = ref(model)
        self.depth = 0
        self.number: int | None = None
        self.devices: list[DevicePass] = []

    def begin(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        if self.number != _requests.number:
            self._gather()
        for part in self.devices:
            part.is_open = True
            part.refresh(torch._C._current_graph_task_id(), _place(part.device))

    def end(self) -> None:
        self.depth -= 1
        if not self.depth:
            for part in self.devices:
                part.is_open = False
                part.release()

    def _gather(self) -> None:
        """Sort the caches that have a request by device, unless they stand as they were."""
        caches = [cache for cache in caches_of(self.model()) if cache.request is not None]
        by_device: dict[torch.device, list[NormCache]] = {}
        for cache in caches:
            if cache.moves <= MOST_MOVES and _is_steady(cache.request):
                by_device.setdefault(cache.request.A.device, []).append(cache)
        known = {part.device: part for part in self.devices}
        self.devices = []
        for device, found in by_device.items():
            part = known.get(device)
            members = [(cache, cache.request) for cache in found]
            same = part is not None and len(part.members) == len(members) and all(
                old is new and was is now for (old, was), (new, now) in zip(part.members, members, strict=True)
            )  # fmt: skip
            self.devices.append(part if same else DevicePass(found))
        self.number = _requests.number


def _is_steady(request: Request) -> bool:
    """Whether the kernels read the very parameters and the very weight, not copies that are made for each pass."""
    member = request.member
    pairs = [(member.a, request.A), (member.b, request.B)]
    if request.magnitude is not None:
        pairs.append((member.magnitude, request.magnitude))
    if not all(type(whole) is nn.Parameter and part.data_ptr() == whole.data_ptr() for part, whole in pairs):
        return False
    # A weight that had to be copied into a matrix gives another copy each time.
    read = member.source is not None and request.packed is None
    return not read or member.source.pointers[0].data_ptr() == request.weight.dense().data_ptr()


def _addresses(members: list[Any]) -> list[int]:
    """Where the parameters of the members are."""
    return [
        0 if tensor is None else tensor.data_ptr()
        for member in members
        for tensor in (member.a, member.b, member.magnitude)
    ]


def caches_of(model: nn.Module) -> list[NormCache]:
    """The caches of all layers of a model that have some."""
    found = []
    for module in model.modules():
        if callable(getattr(module, "dora_caches", None)):
            found += module.dora_caches()
    return found


_passes: WeakKeyDictionary[nn.Module, ModelPass] = WeakKeyDictionary()


def begin_pass(model: nn.Module, *args: Any) -> None:
    """A pass over `model` begins: the factors of all its adapters are brought up to date at once."""
    if torch.compiler.is_compiling():
        return
    found = _passes.get(model)
    if found is None:
        found = _passes[model] = ModelPass(model)
    found.begin()


def end_pass(model: nn.Module, *args: Any) -> None:
    """The pass that `begin_pass` began is over."""
    if torch.compiler.is_compiling():
        return
    found = _passes.get(model)
    if found is not None and found.depth:
        found.end()


def watch_passes(model: nn.Module) -> None:
    """Let every call of `model` begin and end a pass over it."""
    if begin_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(begin_pass)
        model.register_forward_hook(end_pass, always_call=True)


def unwatch_passes(model: nn.Module) -> None:
    """Undo `watch_passes`."""
    for hooks, function in ((model._forward_pre_hooks, begin_pass), (model._forward_hooks, end_pass)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    _passes.pop(model, None)
