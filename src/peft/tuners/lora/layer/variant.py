# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What a variant of LoRA answers: how it starts, what it does to an output and to a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft.engine.method import Folded, Method

from ..method import why_no_bias_fold

if TYPE_CHECKING:
    from .base import LoraLayer


class LoraVariant(Method):
    """A way of using A and B other than plain LoRA, chosen by `LoraLayer.resolve_lora_variant`.

    Subclasses, ours and others', override the static methods; the machine calls them through `Method`.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Create what the variant needs besides A and B. Runs when the adapter is created."""
        raise NotImplementedError("A LoraVariant must define init().")

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight with the adapter in it; `orig_weight` is left alone."""
        raise NotImplementedError("A LoraVariant must define merge_safe().")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Put the adapter into `orig_weight` in place."""
        raise NotImplementedError("A LoraVariant must define merge_unsafe().")

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight without the adapter that `orig_weight` has in it."""
        raise NotImplementedError("A LoraVariant must define unmerge().")

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The output with the adapter applied, from the input `x` and the output `result` without it."""
        raise NotImplementedError("A LoraVariant must define forward().")

    def supports_lora_conversion(self) -> bool:
        """Whether the update of the weight can be written as plain LoRA."""
        return True

    # ---- the same, as the machine asks for it ----------------------------------------------------------------------
    def why_not_foldable(self, layer: LoraLayer, name: str) -> str | None:
        return why_no_bias_fold(layer, name)

    def apply(self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.forward(layer, active_adapter=name, x=x, result=y, **kwargs)

    def fold(self, layer: LoraLayer, name: str, folded: Folded, kept: Any) -> Folded:
        weight = self.merge_safe(layer, name, folded.weight)
        return Folded(weight, self._shifted_bias(layer, name, folded.bias, 1))

    def unfold(self, layer: LoraLayer, name: str, folded: Folded, kept: Any) -> Folded:
        weight = self.unmerge(layer, name, folded.weight)
        return Folded(weight, self._shifted_bias(layer, name, folded.bias, -1))

    @staticmethod
    def _shifted_bias(layer: LoraLayer, name: str, bias: torch.Tensor | None, sign: int) -> torch.Tensor | None:
        shift = layer.low_rank_bias(name)
        if shift is None or bias is None:
            return bias
        return torch.add(bias, shift.to(bias), alpha=sign * layer.scaling[name])
