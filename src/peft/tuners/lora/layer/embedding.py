# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on embeddings: a row of the table is looked up in A and multiplied by B."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Module

from peft.weights import whole

from ..inits import STARTS
from ..variants.dora import DoraEmbeddingVariant
from ..variants.mica import MiCAEmbeddingVariant
from .base import LoraLayer

if TYPE_CHECKING:
    from ..config import LoraConfig
    from .variant import LoraVariant


class Embedding(LoraLayer, nn.Module):
    """LoRA on `nn.Embedding`: A `[r, num_embeddings]`, B `[embedding_dim, r]`; dropout does not apply.

    Args:
        base_layer: The embedding to adapt.
        adapter_name: Name of the first adapter.
        config: Its settings.
        r: Its rank.
        lora_alpha: Numerator of its scaling.
        init_lora_weights: Taken for compatibility; the config's value counts.

    Raises:
        ValueError: The config asks for `lora_bias`, which an embedding cannot have.
    """

    weight_axis = 1
    dora_kind = "embedding"
    known_starts = frozenset(("mica",))
    plain_starts = STARTS - known_starts

    def __init__(
        self,
        base_layer: Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, ("use_dora",): DoraEmbeddingVariant, ("mica",): MiCAEmbeddingVariant}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        if config.lora_bias:
            raise ValueError(
                "lora_bias=True is not possible on an embedding, which has no bias: set lora_bias=False or leave the "
                "embedding out of target_modules."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn(self.out_features, r))

    def has_adapter(self, name: str) -> bool:
        return name in self.lora_embedding_A

    def low_rank_bias(self, name: str) -> None:
        return None

    def low_rank(self, name: str, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        a, b = self.factors(name)
        return self._embed(x, a.t()) @ b.t()

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return whole(self.lora_embedding_A, name), whole(self.lora_embedding_B, name)

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()

    def _embed(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        input_fn: Callable[..., torch.Tensor] | None = None,
        output_fn: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Look `input` up in `weight` with the base layer's settings; the functions shard and gather (tensor parallel)."""
        base = self.get_base_layer()
        if input_fn is not None:
            input = input_fn((input,))
        rows = F.embedding(
            input, weight, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
        )
        return rows if output_fn is None else output_fn(rows)


class LoraEmbeddingATPHolder(nn.Embedding):
    """An adapter's A `[r, num_embeddings]` as the embedding `[num_embeddings, r]` that it is, to be cut by tokens.

    Args:
        lora_embedding_A_weight: A; its storage is shared, not its gradient.
    """

    def __init__(self, lora_embedding_A_weight: nn.Parameter) -> None:
        table = lora_embedding_A_weight.detach().t()
        super().__init__(*table.shape, _weight=table)
        self.weight.requires_grad_(lora_embedding_A_weight.requires_grad)
