# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""KaSA (Wang et al., arXiv 2412.06071): B diag(σ) A with trained singular values, on a base weight without its noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..inits.base_weight import read_matrix, write_matrix
from .additive import AdditiveVariant

if TYPE_CHECKING:
    from ..config import KasaConfig
    from ..layer.base import LoraLayer


class KasaLinearVariant(AdditiveVariant):
    """KaSA on linear layers: y + s · B diag(`lora_diag`) A x, the r smallest singular values of W set to zero."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Truncate the base weight and create `lora_diag` `[r]`, standard normal.

        Raises:
            ValueError: r leaves no singular value of the base weight.
        """
        r = module.r[adapter_name]
        smallest = min(module.in_features, module.out_features)
        if r >= smallest:
            raise ValueError(
                f"kasa_config: r={r} takes all {smallest} singular values out of a base weight "
                f"[{module.out_features}, {module.in_features}]: lower r, for this layer alone by rank_pattern."
            )
        if module.norm_weight().device.type != "meta":
            _truncate(module, r)
        module.add_slot("lora_diag", nn.ParameterDict({}))
        like = module.factors(adapter_name)[0]
        module.lora_diag[adapter_name] = nn.Parameter(torch.randn(r, dtype=like.dtype, device=like.device))

    def supports_lora_conversion(self) -> bool:
        return False  # the base weight was truncated: what the adapter adds does not go on top of the whole one

    @staticmethod
    def delta(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        a, b = (factor.to(_wide(factor)) for factor in module.factors(active_adapter))
        delta = (b * module.lora_diag[active_adapter].to(b)) @ a * module.scaling[active_adapter]
        return delta.t() if module.fan_in_fan_out else delta

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module._cast_input_dtype(x, lora_a.weight.dtype)
        hidden = lora_a(module.lora_dropout[active_adapter](x)) * module.lora_diag[active_adapter]
        return result + lora_b(hidden) * module.scaling[active_adapter]


def _truncate(module: LoraLayer, r: int) -> None:
    """Take the parts with the r smallest singular values out of the base weight (section 3.2)."""
    matrix = read_matrix(module)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    write_matrix(module, matrix - u[:, -r:] * s[-r:] @ vt[-r:])


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def kasa_loss(layers: Iterable[LoraLayer], configs: dict[str, KasaConfig]) -> torch.Tensor | float:
    """What KaSA adds to the loss: Σ β‖σ‖² + γ(‖A Aᵀ − I‖ + ‖Bᵀ B − I‖) over layers and adapters (equations 9, 10).

    Args:
        layers: The model's LoRA layers.
        configs: The settings of those adapters that are KaSA.
    """
    total: torch.Tensor | float = 0.0
    for layer in layers:
        for name, diagonal in getattr(layer, "lora_diag", {}).items():
            if name not in configs:
                continue
            a, b = layer.factors(name)
            one = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
            apart = torch.linalg.norm(a @ a.t() - one) + torch.linalg.norm(b.t() @ b - one)
            total = total + configs[name].beta * diagonal.square().sum() + configs[name].gamma * apart
    return total
