# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""VeLoRA (Miles et al., arXiv 2405.17991): plain LoRA that keeps the input of A compressed to train it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft.tuners._buffer_dict import BufferDict

from ..velora import VeloraFunction, groups_of
from .additive import AdditiveVariant

if TYPE_CHECKING:
    from ..layer.base import LoraLayer

_INIT_TYPES = ("batch_average", "batch_average_once", "random")


class VeloraLinearVariant(AdditiveVariant):
    """VeLoRA on linear layers: the output is plain LoRA's, A's gradient comes from compressed inputs."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Create the direction `lora_velora_embed` `[ceil(in / num_groups)]`.

        Raises:
            ValueError: `num_groups` is not positive, or `init_type` unknown.
        """
        settings = config.velora_config
        if settings.num_groups < 1 or settings.init_type not in _INIT_TYPES:
            raise ValueError(
                f"velora_config: num_groups={settings.num_groups} must be at least 1, init_type={settings.init_type!r} one "
                f"of {', '.join(_INIT_TYPES)}."
            )
        width = -(-module.in_features // settings.num_groups)
        like = module.lora_A[adapter_name].weight
        random = settings.init_type == "random"
        embed = torch.randn(width) if random else torch.zeros(width)
        if random:
            embed /= embed.norm()
        embed = embed.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
        module.add_setting("lora_velora_embed", adapter_name, embed, BufferDict({}, persistent=True))
        module.add_setting("lora_velora_initialized", adapter_name, random)
        module.add_setting("lora_velora_num_groups", adapter_name, settings.num_groups)
        module.add_setting("lora_velora_init_type", adapter_name, settings.init_type)
        module.add_setting("lora_velora_scale", adapter_name, settings.scale)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, lora_a.weight.dtype))
        if module.training:
            _follow_batch(module, active_adapter, x.detach())
            embed = module.lora_velora_embed[active_adapter]
            groups, scale = module.lora_velora_num_groups[active_adapter], module.lora_velora_scale[active_adapter]
            hidden = VeloraFunction.apply(x, lora_a.weight, lora_a.bias, embed, groups, scale)
        else:
            hidden = lora_a(x)
        return result + lora_b(hidden) * module.scaling[active_adapter]


@torch.no_grad()
def _follow_batch(module: LoraLayer, name: str, x: torch.Tensor) -> None:
    """Set the direction to the batch's average group, of norm 1, as often as `init_type` says."""
    kind = module.lora_velora_init_type[name]
    if kind == "random" or (kind == "batch_average_once" and module.lora_velora_initialized[name]):
        return
    embed = module.lora_velora_embed[name]
    average = groups_of(x.float(), embed.numel()).mean((0, 1))
    norm = average.norm()
    even = torch.full_like(average, embed.numel() ** -0.5)
    embed.copy_(torch.where(norm > 0, average / norm, even))
    module.lora_velora_initialized[name] = True
