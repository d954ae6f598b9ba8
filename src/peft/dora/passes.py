# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Passes over a whole model, in which the factors of many adapters are brought up to date at once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from .factors import GAIN_FLOOR, MOST_MOVES, Factors, NormCache, Request, addresses_of, factors_of, is_steady, requests
from .route import kernels

OUTSIDE_BACKWARD = -1  # what torch gives as the number of the backward pass where there is none
CHUNK_BYTES = 12 * 2**20  # of copies of A and B that are made, and held, together
MOST_OPEN = 2  # chunks of a kind; layers that are called one after the other may be in two


class Chunk:
    """Adapters of neighbouring layers whose factors are brought up to date together, in two launches.

    That is done where a pass first calls one of the layers: a pass over the model, or a backward pass that runs them
    once more (checkpointing). It holds for that pass alone. Nothing can change the parameters of a layer in between but
    code that the model itself runs.

    Args:
        model_pass: The passes that it belongs to.
        caches: The adapters' caches, each with its request, all of one kind.
    """

    def __init__(self, model_pass: ModelPass, caches: list[NormCache]) -> None:
        self.model_pass = model_pass
        self.members = [(cache, cache.request) for cache in caches]
        first = self.members[0][1]
        self.kind = _kind_of(first)
        self.batch = kernels().Batch([request.member for _, request in self.members], first.dtype)
        self.batch.move(self.batch.members, GAIN_FLOOR if first.floor else 0.0)
        for i, (cache, _) in enumerate(self.members):
            cache.shared = self, i
            cache.batch = None  # its norms are kept here from now on
        self.watched = [p for _, request in self.members for p in (request.A, request.B, request.magnitude)]
        self.addresses = addresses_of([request.member for _, request in self.members])
        self.device = first.A.device
        self.release()

    def release(self) -> None:
        """Let go of the tensors: who still needs them holds them."""
        self.factors: list[Factors] | None = None

    def take(self, i: int) -> Factors | None:
        """The factors of member `i`; None where no pass is known to be running, or another graph or stream is."""
        task = torch._C._current_graph_task_id()
        place = _place(self.device)
        if self.factors is None or task != self.task or place != self.place:
            if task == OUTSIDE_BACKWARD and not self.model_pass.depth:
                return None
            self._open(task, place)
            if self.factors is None:
                return None
        found = self.factors[i]
        if task == OUTSIDE_BACKWARD:
            self.left -= 1
            if (
                not self.left
            ):  # with checkpointing nobody needs them until the backward pass, without it the graph has them
                self.release()
        return found

    def _open(self, task: int, place: tuple) -> None:
        self.release()
        if [0 if p is None else p.data_ptr() for p in self.watched] != self.addresses:
            return
        for _, request in self.members:
            if not request.weight.has_key(request.key):
                return
        with torch.no_grad():
            done = self.batch.refresh()
            self.factors = [
                factors_of(done, i, request.member, request.packed) for i, (_, request) in enumerate(self.members)
            ]
        self.task, self.place, self.left = task, place, len(self.members)
        self.model_pass.note_open(self)
        if task != OUTSIDE_BACKWARD:
            torch.autograd.Variable._execution_engine.queue_callback(self.release)


def _place(device: torch.device) -> tuple:
    """The stream that work goes to, and whether it is being captured into a graph."""
    if device.type != "cuda":
        return ()
    return torch._C._cuda_getCurrentRawStream(device.index), torch._C._cuda_isCurrentStreamCapturing()


def _is_capturing() -> bool:
    """Whether a graph is being captured: what is made then exists in its replays alone."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class ModelPass:
    """Passes over one model: `begin` and `end` enclose each.

    Args:
        model: Any module; the caches are found by its layers' method `dora_caches`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = ref(model)
        self.depth = 0
        self.number: int | None = None
        self.chunks: list[Chunk] = []
        self.open: list[Chunk] = []

    def begin(self) -> None:
        self.depth += 1
        if self.depth == 1 and self.number != requests.number and not _is_capturing():
            self._gather()

    def end(self) -> None:
        self.depth -= 1
        if not self.depth:
            for chunk in self.open:
                chunk.release()
            self.open.clear()

    def note_open(self, chunk: Chunk) -> None:
        """Close the chunk of its kind that was opened longest ago where there are too many."""
        if chunk in self.open:
            self.open.remove(chunk)
        self.open.append(chunk)
        alike = [other for other in self.open if other.kind == chunk.kind]
        if len(alike) > MOST_OPEN:
            alike[0].release()
            self.open.remove(alike[0])

    def _gather(self) -> None:
        """Put the caches that have a request into chunks; chunks that stand as they were keep what they know."""
        known, self.chunks = self.chunks, []
        for caches in _divide(caches_of(self.model())):
            members = [(cache, cache.request) for cache in caches]
            stands = next((chunk for chunk in known if _same(chunk.members, members)), None)
            self.chunks.append(stands or Chunk(self, caches))
        self.number = requests.number


def _same(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(a is c and b is d for (a, b), (c, d) in zip(one, other, strict=True))


def _kind_of(request: Request) -> tuple:
    return *kernels().kind_of(request.member, request.dtype), request.floor


def _divide(caches: list[NormCache]) -> list[list[NormCache]]:
    """Caches with steady requests by kind, in order, until the copies of their factors would fill a chunk."""
    divided: list[list[NormCache]] = []
    filling: dict[tuple, tuple[list[NormCache], int]] = {}
    for cache in caches:
        request = cache.request
        if request is None or cache.moves > MOST_MOVES or not is_steady(request):
            continue
        kind = _kind_of(request)
        size = (request.A.numel() + request.B.numel()) * request.dtype.itemsize
        chunk, filled = filling.get(kind, ([], 0))
        if not chunk or filled + size > CHUNK_BYTES:
            chunk, filled = [], 0
            divided.append(chunk)
        chunk.append(cache)
        filling[kind] = chunk, filled + size
    return divided


def caches_of(model: nn.Module) -> list[NormCache]:
    """The caches of all layers of a model that have some."""
    found = []
    for module in model.modules():
        if callable(getattr(module, "dora_caches", None)):
            found += module.dora_caches()
    return found


_passes: WeakKeyDictionary[nn.Module, ModelPass] = WeakKeyDictionary()


def begin_pass(model: nn.Module, *args: Any) -> None:
    """A pass over `model` begins: the factors of its adapters may be brought up to date together."""
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
