# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which body computes DoRA on a layer, and why: decided before the first pass, printed on request, and
warned about once."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import nn

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYER_KINDS = ("linear", "conv", "embedding")
_OFF = "use_dora_triton is off"


class Route(NamedTuple):
    """The body that runs, and the reason for it.

    Args:
        path: "triton" or "torch".
        reason: Why, in words.
    """

    path: Literal["triton", "torch"]
    reason: str


def plan(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    want_triton: bool | None,
    kind: str = "linear",
    away: str | None = None,
) -> Route:
    """Choose the body for one layer; where Triton was asked for and cannot run, one warning says why.

    Args:
        device: Where the layer's weight is.
        dtype: The dtype in which the weight is read.
        want_triton: The adapter's `use_dora_triton`; None to take Triton where a GPU has it and to say nothing otherwise.
        kind: "linear", "conv" or "embedding".
        away: Where the weight is while the layer does not run, in words; None where it is on `device`.
    """
    if want_triton is False or (want_triton is None and interpreting()):
        return Route("torch", _OFF)
    reason = away or _obstacle(torch.device(device), dtype, kind)
    if reason is not None:
        if want_triton:
            warn_once(reason)
        return Route("torch", reason)
    return Route("triton", "the interpreter runs the kernels" if interpreting() else f"kernels on {device}")


def _obstacle(device: torch.device, dtype: torch.dtype, kind: str) -> str | None:
    if kind not in LAYER_KINDS:
        return f"there are no kernels for a layer of kind {kind!r}"
    if dtype not in TRITON_DTYPES:
        return f"the kernels compute in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if not triton_is_installed():
        return "triton is not installed"
    if interpreting():
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, the layer is on {device}"
    if device.type != "cuda":  # ROCm's devices have that name too
        return f"the kernels need a GPU of CUDA or ROCm, the layer is on {device}"
    if dtype == torch.bfloat16 and not _has_bfloat16(device.index):
        return "this GPU has no bfloat16"
    return None


@functools.cache
def triton_is_installed() -> bool:
    """Whether triton can be imported; it is not imported for the answer."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_bfloat16(index: int | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def kernels() -> ModuleType:
    """The Triton bodies; the first call imports triton."""
    return importlib.import_module(f"{__package__}.kernels")


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Warn that PyTorch runs in Triton's place, once a reason and process."""
    if reason in _warned:
        return
    _warned.add(reason)
    from peft.utils.warning import PeftWarning

    warnings.warn(f"use_dora_triton=True, but DoRA runs in PyTorch: {reason}.", PeftWarning, stacklevel=3)


def explain(model: nn.Module) -> str:
    """Print and return one line for each DoRA adapter of each layer: the layer's name, the path and the reason.

    Args:
        model: Any module; layers are found by their method `dora_routes`, which maps adapter names to routes.
    """
    lines = [
        f"{name or type(module).__name__} [{adapter}]: {route.path} ({route.reason})"
        for name, module in model.named_modules()
        if callable(getattr(module, "dora_routes", None))
        for adapter, route in module.dora_routes().items()
    ]
    text = "\n".join(lines) if lines else "no DoRA layer found"
    print(text)
    return text
