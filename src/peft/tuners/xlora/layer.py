# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What takes the place of a LoRA layer's forward pass: each expert's update, weighed by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.method import LORA

from .config import XLoraConfig

if TYPE_CHECKING:
    from .model import XLoraModel


class XLoraLayer:
    """The weighed forward pass of one LoRA layer.

    Args:
        model: The X-LoRA model, which knows the weights of the running pass.
        target: The layer.
        target_forward: Its own forward pass.
        layer_number: Its number among the adapted layers.
        config: Settings.
    """

    def __init__(
        self,
        model: nn.Module,
        target: LoraLayer,
        target_forward: Callable[..., Any],
        layer_number: int,
        config: XLoraConfig,
    ) -> None:
        self.model: XLoraModel = model
        self.target = target
        self.target_forward = target_forward
        self.layer_number = layer_number
        self.config = config

    @property
    def adapters_disabled(self) -> bool:
        """Whether the layer gives its base layer's output."""
        return self.target.disable_adapters

    @staticmethod
    def apply_scalings_to_x(x: torch.Tensor, scalings_layer: torch.Tensor, adapter: int) -> torch.Tensor:
        """x `[batch, length, …]` times one expert's weights.

        Args:
            x: What to scale.
            scalings_layer: Weights of a layer `[batch, length, experts]`.
            adapter: The expert's number.
        """
        return x * scalings_layer[..., adapter].unsqueeze(-1).to(x)

    def get_maybe_topk_scalings(self, scalings: torch.Tensor) -> torch.Tensor:
        """This layer's weights `[batch, length, experts]`, those beyond the `top_k_lora` largest set to zero.

        Args:
            scalings: Weights of all layers `[batch, length, layers, experts]`.
        """
        own = scalings[:, :, self.layer_number, :]
        if self.config.top_k_lora is None:
            return own
        best, chosen = own.topk(min(self.config.top_k_lora, own.shape[-1]), dim=-1)
        if self.config.enable_softmax_topk:
            best = best.softmax(-1)
        return torch.zeros_like(own).scatter(-1, chosen, best)

    def forward(
        self, x: torch.Tensor, *args: Any, scalings: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Base output plus Σₖ weight · update of expert k.

        Args:
            x: Input.
            *args, **kwargs: For the layer.
            scalings: Weights of all layers; None for those of the running pass.

        Raises:
            ValueError: The output's positions are not the tokens that the weights are for.
        """
        target = self.target
        scalings = self.model.internal_xlora_scalings if scalings is None else scalings
        if self.adapters_disabled or scalings is None:
            return self.target_forward(x, *args, **kwargs)
        if self.model.__dict__.get("_base_alone"):  # a softmax of the best among zeros would not be zero
            return target.base_layer(x, *args, **kwargs)
        own = self.get_maybe_topk_scalings(scalings)
        base = y = target.base_layer(x, *args, **kwargs)
        for number, name in enumerate(self.config.adapters):
            if target.has_adapter(name):
                update = _update(target, name, x, base)
                y = y + self.config.global_scaling_weight * self._weighed(update, own, number)
        return y.to(base.dtype)

    def _weighed(self, update: torch.Tensor, own: torch.Tensor, number: int) -> torch.Tensor:
        if update.dim() == 2 and len(update) == own.shape[0] * own.shape[1]:  # tokens in one row, as for experts
            own = own.flatten(0, 1)
        if update.shape[:-1] != own.shape[:-1]:
            raise ValueError(
                f"A layer gives {list(update.shape)} and X-LoRA has weights for {list(own.shape[:-1])} tokens: leave layers "
                "that do not work on tokens out of the experts' target_modules."
            )
        return self.apply_scalings_to_x(update, own, number)


def _update(layer: LoraLayer, name: str, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What an expert adds to the base layer's output."""
    method = layer.method(name)
    if method is LORA:  # without adding it to the output first, which would round
        return layer.low_rank(name, x) * layer.scaling[name]
    return method.apply(layer, name, x, base) - base


class XLoraLinearLayer(XLoraLayer):
    """The weighed forward pass of a linear layer."""


class XLoraEmbeddingLayer(XLoraLayer):
    """The weighed forward pass of an embedding."""


class XLoraConv2dLayer(XLoraLayer):
    """The weighed forward pass of a convolution, whose positions are no tokens: a batch entry's mean weights count."""

    def _weighed(self, update: torch.Tensor, own: torch.Tensor, number: int) -> torch.Tensor:
        means = own[..., number].mean(1)
        return update * means.reshape(-1, *[1] * (update.dim() - 1)).to(update)
