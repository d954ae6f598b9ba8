# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MiCA: plain LoRA whose B is frozen, along the weight's minor left singular vectors (`inits.mica`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .additive import AdditiveVariant

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


class MiCALinearVariant(AdditiveVariant):
    """MiCA on linear layers: only A is trained."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        module.freeze_slots(adapter_name, ("lora_B",))


class MiCAEmbeddingVariant(AdditiveVariant):
    """MiCA on embeddings: only A `[r, num_embeddings]` is trained."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        module.freeze_slots(adapter_name, ("lora_embedding_B",))
