# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Launching a kernel at the price of a few dictionary look-ups: Triton's own launch goes through its binder each time,
which costs the host more than most of these kernels cost the GPU."""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from ..route import interpreting

MOST_VARIANTS = 1024


class Kernel:
    """A `triton.jit` function with a table of its compiled variants.

    A variant is found by what Triton itself specialises on: device, dtypes, whole numbers (by value, except those that
    the function is told not to specialise on) and constants; pointers are aligned to 16 bytes, or Triton decides. The
    compiled kernel is the same whichever way it is launched.

    Args:
        function: The jitted function; its constants come last.
        free: Positions of the whole numbers named in its `do_not_specialize`.
    """

    def __init__(self, function: Any, free: tuple[int, ...] = ()) -> None:
        self.function = function
        self.free = frozenset(free)
        self.variants: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, int, int], args: tuple, constants: tuple, **options: Any) -> None:
        """Launch over a grid that is not empty.

        Args:
            grid: Programs in three dimensions.
            args: Tensors, numbers and None, in the function's order; the first is a tensor on the device.
            constants: Its constants, in its order.
            options: `num_warps` and the like.
        """
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, args, constants, options)
        else:
            self._launch(grid, args, constants, options)

    def _launch(self, grid: tuple[int, int, int], args: tuple, constants: tuple, options: dict[str, Any]) -> None:
        if interpreting() or _is_watched():
            self.function[grid](*args, *constants, **options)
            return
        key, aligned = self._key(args, constants, options)
        variant = self.variants.get(key) if aligned else None
        if variant is not None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            variant.run(*grid, stream, variant.function, variant.packed_metadata, None, None, None, *args, *constants)
            return
        compiled = self.function[grid](*args, *constants, **options)
        if aligned and all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            if len(self.variants) >= MOST_VARIANTS:
                self.variants.clear()
            self.variants[key] = compiled

    def _key(self, args: tuple, constants: tuple, options: dict[str, Any]) -> tuple[tuple, bool]:
        kinds: list[Any] = [args[0].device.index]
        pointers = 0
        free = self.free
        for position, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                kinds.append(arg.dtype)
                pointers |= arg.data_ptr()
            elif isinstance(arg, float):
                kinds.append(float)
            else:
                kinds.append(None if position in free else arg)
        return (*kinds, constants, *options.values()), pointers % 16 == 0


def _is_watched() -> bool:
    """Whether a profiler listens to launches; Triton then builds what it is told."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))
