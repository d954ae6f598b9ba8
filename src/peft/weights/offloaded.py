# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that accelerate keeps in host memory or on disk: read from there in the rows that are asked for, so that no
more of a layer than these is on the device that computes."""

from __future__ import annotations

import os
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import offload_state_dict
from torch import nn

from .base import BaseWeight, SameObject, stamp
from .plain import PlainWeight

_WRITES = "_peft_writes"  # on a hook: how often its store was written to through `put`


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that brings a module's tensors in for a call and takes them away again, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)


def present(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter of a module, on the device that it runs on, without gradient where it is offloaded; None if it has none."""
    parameter = getattr(module, name, None)
    hook = offload_hook(module) if parameter is not None and parameter.is_meta else None
    return parameter if hook is None else hook.weights_map[name].to(device_of(hook))


def device_of(hook: AlignDevicesHook) -> torch.device:
    """Where accelerate runs the module of an `offload_hook`."""
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def put(hook: AlignDevicesHook, tensors: dict[str, torch.Tensor]) -> None:
    """Overwrite tensors of one module in accelerate's store.

    Args:
        hook: The module's `offload_hook`.
        tensors: New values by their names in the module. On disk they are written into accelerate's offload folder,
            and the pointer to the file that they were read from is dropped.
    """
    weights_map = hook.weights_map
    dataset, prefix = getattr(weights_map, "dataset", weights_map), getattr(weights_map, "prefix", "")
    values = {prefix + name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
    folder = getattr(dataset, "save_folder", None)
    if folder is None:
        getattr(dataset, "state_dict", dataset).update(values)
    else:
        offload_state_dict(os.fspath(folder), values)
        for name, tensor in values.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            dataset.index[name] = {"dtype": dtype, "shape": list(tensor.shape)}
    setattr(hook, _WRITES, getattr(hook, _WRITES, 0) + 1)


class OffloadedWeight(BaseWeight):
    """A plain weight that is on the meta device while its layer does not run.

    Matrices and rows come on the device that the layer runs on. An object holds what it read from the disk, so it is
    to be let go of after use.

    Args:
        plain: The weight as its layer has it, without values.
        hook: The layer's `offload_hook`.
    """

    format = "offloaded plain"
    away = "accelerate keeps the weight off the device and brings in rows of it"

    def __init__(self, plain: PlainWeight, hook: AlignDevicesHook) -> None:
        super().__init__(plain.layer)
        self.hook = hook
        self._plain = plain

    @cached_property
    def _stored(self) -> PlainWeight:
        return PlainWeight(SimpleNamespace(weight=self.hook.weights_map["weight"]), self._plain.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        return self._plain.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._plain.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.hook)

    @property
    def bias(self) -> torch.Tensor | None:
        return present(self.layer, "bias")

    @property
    def lossy(self) -> bool:
        return False

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._stored.dense().to(device=self.device, dtype=dtype or self.dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._stored.rows(a, b).to(device=self.device, dtype=dtype or self.dtype)

    def write(self, matrix: torch.Tensor) -> None:
        self._check_matrix(matrix)
        stored = self._plain.layer.weight
        matrix = matrix.T if self._plain.transposed else matrix
        self._replace(matrix.reshape(stored.shape).to(stored.dtype).contiguous())

    def snapshot(self) -> torch.Tensor:
        return self._stored.snapshot()

    def restore(self, snapshot: torch.Tensor) -> None:
        self._replace(snapshot.clone())

    def _replace(self, tensor: torch.Tensor) -> None:
        put(self.hook, {"weight": tensor})
        self.__dict__.pop("_stored", None)

    def key(self) -> tuple:
        weights_map = self.hook.weights_map
        on_disk = getattr(getattr(weights_map, "dataset", weights_map), "save_folder", None) is not None
        value: Any = () if on_disk else stamp(weights_map["weight"])
        return SameObject(self.hook), getattr(self.hook, _WRITES, 0), *value
