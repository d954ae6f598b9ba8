# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights stored as they are, in a floating dtype: linear layers in both orientations, convolutions, embeddings."""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import BaseWeight, bears, comes_and_goes, overwrite, stamp, untouched, writing


class PlainWeight(BaseWeight):
    """A floating weight whose first dimension is the output: [out, in], or [out, in / groups, *kernel] flattened.

    Args:
        layer: The base layer.
        transposed: The weight is stored [in, out] (`fan_in_fan_out`, transformers' Conv1D, embeddings [num, dim]);
            the logical matrix is its transposed view.
    """

    format = "plain"

    def __init__(self, layer: nn.Module, transposed: bool = False) -> None:
        super().__init__(layer)
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, int]:
        first, *rest = self.layer.weight.shape
        second = math.prod(rest)
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def lossy(self) -> bool:
        return False

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        # By the module's own look-up it costs as much as a launch. It is not there where it is computed, gathered or read.
        weight = self.layer.__dict__.get("_parameters", {}).get("weight")
        matrix = self._view(self.layer.weight if weight is None else weight)
        return matrix if dtype is None or dtype == matrix.dtype else matrix.to(dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        weight = self.layer.weight.detach()
        # A convolution in channels_last can only be flattened by a copy: cut first.
        block = self._view(weight)[a:b] if self.transposed else self._view(weight[a:b])
        return block if dtype is None else block.to(dtype)

    def write(self, matrix: torch.Tensor) -> None:
        self._check_matrix(matrix)
        weight = self.layer.weight
        with writing(weight):
            weight.copy_((matrix.T if self.transposed else matrix).reshape(weight.shape))

    def snapshot(self) -> torch.Tensor:
        return self.layer.weight.detach().clone()

    def restore(self, snapshot: torch.Tensor) -> None:
        weight = self.layer.weight
        if weight.is_meta or (weight.shape, weight.dtype) != (snapshot.shape, snapshot.dtype):
            weight.data = snapshot.clone()
        else:
            overwrite(weight, snapshot.to(weight.device))

    def key(self) -> tuple:
        return (object(),) if comes_and_goes(self.layer) else stamp(self.layer.weight)

    def has_key(self, key: tuple) -> bool:
        return not comes_and_goes(self.layer) and bears(self.layer.weight, key)

    def direct(self) -> bool:
        layer = self.layer
        known = _FORWARDS.get(type(layer)) or _foreign_forward(type(layer))
        return (
            known is not None
            and type(layer).forward is known
            and getattr(layer, "max_norm", None) is None  # an embedding with it rescales its weight in each forward
            and untouched(layer, layer.weight)
        )

    def _view(self, weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.detach() if weight.dim() == 2 else weight.detach().flatten(1)
        return matrix.T if self.transposed else matrix


# Taken when this module is imported: a class whose forward is replaced later is no longer the class that we know.
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)}
_FOREIGN = "transformers.pytorch_utils", "Conv1D"


def _foreign_forward(kind: type):
    """The forward of transformers' Conv1D as its class body defines it; None for any other class."""
    forward = kind.__dict__.get("forward")
    if (kind.__module__, kind.__qualname__) != _FOREIGN or getattr(forward, "__module__", None) != _FOREIGN[0]:
        return None
    return forward
