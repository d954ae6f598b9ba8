# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MonteCLoRA (Sengupta et al., arXiv 2411.04358) on linear layers: while it trains, A varies; after that it is A."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..monteclora import MontecloraSampler
from .additive import AdditiveVariant

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


class MontecloraLinearVariant(AdditiveVariant):
    """y + s · B (A + Σₖ πₖ vₖᵀ) x in training, plain LoRA in evaluation and when merged."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Create the sampler of A's variation.

        Raises:
            ValueError: `num_samples` is not positive.
        """
        settings = config.monteclora_config
        if settings.num_samples < 1:
            raise ValueError(f"monteclora_config: num_samples={settings.num_samples} must be at least 1.")
        like = module.lora_A[adapter_name].weight
        module.add_slot("lora_monteclora_sampler", nn.ModuleDict())
        module.lora_monteclora_sampler[adapter_name] = MontecloraSampler(
            module.in_features,
            module.r[adapter_name],
            settings.num_samples,
            use_entropy=settings.use_entropy,
            dirichlet_prior=settings.dirichlet_prior,
            sample_scaler=settings.sample_scaler,
            kl_loss_weight=settings.kl_loss_weight,
            buffer_size=settings.buffer_size,
            device=like.device,
            dtype=like.dtype,
        )

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if not module.training:
            return AdditiveVariant.forward(module, active_adapter, x, result)
        a = module.lora_A[active_adapter].weight
        samples, weights = module.lora_monteclora_sampler[active_adapter]()
        varied = a + torch.einsum("k,kir->ri", weights, samples).to(a)
        x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, a.dtype))
        return result + module.lora_B[active_adapter](F.linear(x, varied)) * module.scaling[active_adapter]
