# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""QA-LoRA (Xu et al., arXiv 2309.14717): A sees means over groups of input features, as group-wise quantisers need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .additive import AdditiveVariant

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


class QALoraLinearVariant(AdditiveVariant):
    """QA-LoRA on linear layers: A is `[r, in / group]`, its input the means of `qalora_group_size` neighbours, times their
    number `in / group`, so that the branch has the size of plain LoRA's."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Replace A by the smaller one.

        Raises:
            ValueError: The input features are no multiple of the group size.
        """
        size = config.qalora_group_size
        if module.in_features % size:
            raise ValueError(
                f"qalora_group_size={size} must divide in_features={module.in_features}: choose another size, or leave "
                "the layer out of target_modules."
            )
        module.add_setting("qalora_group_size", adapter_name, size)
        old = module.lora_A[adapter_name].weight
        smaller = nn.Linear(module.in_features // size, module.r[adapter_name], bias=False)
        module.lora_A[adapter_name] = smaller.to(device=old.device, dtype=old.dtype)

    @staticmethod
    def delta(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        size = module.qalora_group_size[active_adapter]
        product = b.to(wide) @ a.to(wide) * (module.scaling[active_adapter] * a.shape[1] / size)
        delta = product.repeat_interleave(size, dim=1)
        return module.as_stored(delta)

    @staticmethod
    def get_delta_weight(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        """`scaling · B A · in / group²`, each column repeated for the features of its group, in the base weight's shape."""
        return QALoraLinearVariant.delta(module, active_adapter).to(module.lora_B[active_adapter].weight.dtype)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, lora_a.weight.dtype))
        means = x.unflatten(-1, (-1, module.qalora_group_size[active_adapter])).mean(-1)
        return result + lora_b(lora_a(means * means.shape[-1])) * module.scaling[active_adapter]
