# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Launching a kernel at the price of a dictionary look-up: Triton's own launch goes through its binder each time, which
costs the host more than most of these kernels cost the GPU."""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs

# Triton decides when a kernel is defined; afterwards the environment is no longer asked.
INTERPRETED = bool(knobs.runtime.interpret)
MOST_VARIANTS = 1024
ALIGNMENT = 16


class Kernel:
    """A `triton.jit` function whose arguments are pointers, then numbers, then constants; and its compiled variants.

    A variant is found by what Triton itself specialises on: device, dtypes, numbers (by value, except the first ones,
    which the function is told not to specialise on), constants and options; with pointers that are not aligned to 16
    bytes, Triton is asked each time. The compiled kernel is the same whichever way it is launched.

    Args:
        function: The jitted function.
        free: How many numbers, from the first, stand in its `do_not_specialize`.
    """

    def __init__(self, function: Any, free: int = 0) -> None:
        self.function = function
        self.free = free
        self.variants: dict[tuple, tuple] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple,
        constants: tuple,
        warps: int = 4,
        stages: int = 3,
        fusion: bool = True,
    ) -> None:
        """Launch over a grid that is not empty.

        Args:
            grid: Programs in three dimensions.
            tensors: The pointers, in the function's order; the first is a tensor on the device.
            numbers, constants: The other arguments, in its order.
            warps, stages: `num_warps` and `num_stages`.
            fusion: `enable_fp_fusion`: whether products and sums may be rounded as one.
        """
        options = (warps, stages, fusion)
        index = tensors[0].get_device()
        if INTERPRETED or tensors[0].device.type != "cuda":
            self._ordinary(grid, tensors, numbers, constants, options)
        elif index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self._light(index, grid, tensors, numbers, constants, options)
        else:
            self._light(index, grid, tensors, numbers, constants, options)

    def _light(
        self, index: int, grid: tuple, tensors: tuple, numbers: tuple, constants: tuple, options: tuple
    ) -> None:
        pointers: list[int | None] = []
        dtypes: list[torch.dtype | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                pointers.append(pointer)
                dtypes.append(tensor.dtype)
        key = (index, *dtypes, numbers[self.free :], constants, options)
        variant = self.variants.get(key)
        if variant is not None and not bits % ALIGNMENT and not _is_watched():
            run, function, metadata = variant
            stream = torch._C._cuda_getCurrentRawStream(index)
            run(*grid, stream, function, metadata, None, None, None, *pointers, *numbers, *constants)
            return
        compiled = self._ordinary(grid, tensors, numbers, constants, options)
        if not bits % ALIGNMENT and all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            if len(self.variants) >= MOST_VARIANTS:
                self.variants.clear()
            self.variants[key] = compiled.run, compiled.function, compiled.packed_metadata

    def _ordinary(self, grid: tuple, tensors: tuple, numbers: tuple, constants: tuple, options: tuple) -> Any:
        warps, stages, fusion = options
        return self.function[grid](
            *tensors, *numbers, *constants, num_warps=warps, num_stages=stages, enable_fp_fusion=fusion
        )


def _is_watched() -> bool:
    """Whether a profiler listens to launches; Triton then builds what it is told."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))
