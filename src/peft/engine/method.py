# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The contract between a method's maths and the machine that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .layer import AdapterLayer


class Folded(NamedTuple):
    """A base weight and bias after an adapter went in or came out; `bias` is None where the layer has none."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Method(ABC):
    """The maths of one method on one kind of layer: stateless, reading its tensors from the layer it is asked about.

    The layer decides which adapters are active, in which order they go in and out of the base weight, what is kept to
    undo a merge, dtypes and devices. A method answers what one adapter does to an output and to a weight.
    """

    refusal: type[RuntimeError] = RuntimeError  # what merging raises where it is not possible

    def why_not_foldable(self, layer: AdapterLayer, name: str) -> str | None:
        """Why this adapter cannot be folded into the base weight, or None where it can."""
        return None

    @abstractmethod
    def apply(self, layer: AdapterLayer, name: str, x: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Put the adapter's branch on top of an output.

        Args:
            layer: The layer that owns the adapter.
            name: Name of the adapter.
            x: Input of the layer.
            y: Output of the base layer with the adapters before this one applied.

        Returns:
            The new output, in any dtype: the layer casts the final result once.
        """

    def prepare_fold(self, layer: AdapterLayer, name: str, weight: torch.Tensor) -> Any:
        """What folding needs to know of the base weight `[out, ...]` as it is before any adapter went in."""
        return None

    @abstractmethod
    def fold(self, layer: AdapterLayer, name: str, folded: Folded, kept: Any) -> Folded:
        """The weight and bias with the adapter in them; never changes its arguments."""

    @abstractmethod
    def unfold(self, layer: AdapterLayer, name: str, folded: Folded, kept: Any) -> Folded:
        """The weight and bias with the adapter taken out again; `kept` is what `prepare_fold` returned."""


class Additive(Method):
    """A method that adds `delta` to the weight and, where it has one, `bias_delta` to the bias."""

    @abstractmethod
    def delta(self, layer: AdapterLayer, name: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the base weight's shape."""

    def bias_delta(self, layer: AdapterLayer, name: str) -> torch.Tensor | None:
        """What the adapter adds to the base bias `[out]`, or None."""
        return None

    def fold(self, layer: AdapterLayer, name: str, folded: Folded, kept: Any) -> Folded:
        return self._shifted(layer, name, folded, sign=1)

    def unfold(self, layer: AdapterLayer, name: str, folded: Folded, kept: Any) -> Folded:
        return self._shifted(layer, name, folded, sign=-1)

    def _shifted(self, layer: AdapterLayer, name: str, folded: Folded, sign: int) -> Folded:
        weight, bias = folded
        weight = torch.add(weight, self.delta(layer, name).to(weight), alpha=sign)
        shift = self.bias_delta(layer, name)
        if shift is not None:
            bias = torch.add(bias, shift.to(bias), alpha=sign)
        return Folded(weight, bias)
