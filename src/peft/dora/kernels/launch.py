# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Launching a kernel at the price of a few look-ups: Triton's own launch goes through its binder each time, which costs
the host more than most of these kernels cost the GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton import knobs

# Triton decides when a kernel is defined; afterwards the environment is no longer asked.
INTERPRETED = bool(knobs.runtime.interpret)
MOST_KEPT = 256  # launches of one layer, each for a shape of its input


class Kernel:
    """A `triton.jit` function whose arguments are pointers, then numbers, then constants.

    Args:
        function: The jitted function.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def prepare(
        self,
        grid: tuple[int, int, int],
        numbers: tuple,
        constants: tuple,
        warps: int = 4,
        stages: int = 3,
        fusion: bool = True,
        keep: tuple[dict | None, Any] = (None, None),
    ) -> Launch:
        """What a launch needs beside its tensors.

        Args:
            grid: Programs in three dimensions, none of them zero.
            numbers, constants: The arguments after the pointers.
            warps, stages: `num_warps` and `num_stages`.
            fusion: `enable_fp_fusion`: whether products and sums may be rounded as one.
            keep: A dictionary, or None, and the key under which the launch is kept there. Whoever uses it again passes
                tensors of the same dtypes on the same device, and None in the same places.
        """
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
        launch = Launch(self.function, grid, numbers, constants, options)
        launches, key = keep
        if launches is not None:
            if len(launches) >= MOST_KEPT:
                launches.clear()
            launches[key] = launch
        return launch


class Launch:
    """A kernel with everything but its tensors. The first call compiles, or finds, the variant that Triton would take;
    later ones start it. With pointers that are not aligned to 16 bytes, on which Triton specialises, it is asked again.
    """

    __slots__ = ("constants", "function", "grid", "index", "numbers", "options", "start")

    def __init__(self, function: Any, grid: tuple, numbers: tuple, constants: tuple, options: dict) -> None:
        self.function = function
        self.grid, self.numbers, self.constants, self.options = grid, numbers, constants, options
        self.start: Callable | None = None
        self.index: int | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on the current stream; the first tensor is on the device."""
        start = self.start
        if start is None or self.index != torch._C._cuda_getDevice() or _is_watched():
            self._first(tensors)
            return
        pointers = []
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                continue
            pointer = tensor.data_ptr()
            if pointer & 15:
                self.ordinary(tensors)
                return
            pointers.append(pointer)
        start(torch._C._cuda_getCurrentRawStream(self.index), pointers, self.numbers, self.constants)

    def _first(self, tensors: tuple) -> None:
        device = tensors[0].device
        if INTERPRETED or device.type != "cuda":
            self.ordinary(tensors)
            return
        with torch.cuda.device(device):
            compiled = self.ordinary(tensors)
        aligned = all(tensor is None or not tensor.data_ptr() & 15 for tensor in tensors)
        if aligned and all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            self.index, self.start = device.index, starter(compiled, self.grid)

    def ordinary(self, tensors: tuple) -> Any:
        """Launch through Triton; returns the compiled kernel."""
        return self.function[self.grid](*tensors, *self.numbers, *self.constants, **self.options)


def starter(compiled: Any, grid: tuple[int, int, int]) -> Callable:
    """A function of the stream, the pointers, the numbers and the constants that starts a compiled kernel.

    Triton's launcher is a Python object around a C function; where it does nothing that matters here (no scratch memory
    to allocate) the C function is called without it. Its arguments are those of Triton 3.4 to 3.6.
    """
    run = compiled.run
    metadata = compiled.function, compiled.packed_metadata
    wrapper = list(inspect.signature(type(run).__call__).parameters) if not inspect.isfunction(run) else []
    scratch = getattr(run, "global_scratch_size", 1), getattr(run, "profile_scratch_size", 1)
    if wrapper == ["self", "gridX", "gridY", "gridZ", "stream", "function", "args"] and not any(scratch):
        return partial(_start_directly, run.launch, grid, metadata, (run.launch_cooperative_grid, run.launch_pdl))
    return partial(_start, run, grid, metadata)


def _start_directly(
    launch: Callable, grid: tuple, metadata: tuple, flags: tuple, stream: int, pointers: list, *rest: tuple
) -> None:
    numbers, constants = rest
    function, packed = metadata
    launch(*grid, stream, function, *flags, None, None, packed, None, None, None, *pointers, *numbers, *constants)


def _start(run: Callable, grid: tuple, metadata: tuple, stream: int, pointers: list, *rest: tuple) -> None:
    numbers, constants = rest
    function, packed = metadata
    run(*grid, stream, function, packed, None, None, None, *pointers, *numbers, *constants)


def _is_watched() -> bool:
    """Whether a profiler listens to launches; Triton then builds what it is told."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))
