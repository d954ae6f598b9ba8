# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The classifier that weighs experts by the base model's last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import XLoraConfig

Number = int | float | bool


class TemperatureScaledSoftmax(nn.Module):
    """softmax(x / temperature) over the last dimension.

    Args:
        temperature: Large ones make the result even.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.softmax(logits / self.temperature)


class XLoraClassifier(nn.Module):
    """Weights of the experts `[batch, length, layers, experts]` from hidden states `[batch, length, hidden]`.

    Args:
        model: The base model; its dtype is the classifier's.
        config: Sizes and settings.
        n_classes: Number of experts.
        n_layers: Number of adapted layers.
        device: Where to put it.

    Raises:
        ValueError: `xlora_depth` is not positive.
    """

    def __init__(
        self, model: nn.Module, config: XLoraConfig, n_classes: int, n_layers: int, device: torch.device
    ) -> None:
        super().__init__()
        if config.xlora_depth < 1:
            raise ValueError(f"xlora_depth={config.xlora_depth} must be at least 1: the classifier's linear layers.")
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.log_scalings: list[torch.Tensor] = []
        self.scalings_logging = False
        self.override_scaling_pass_value: Number = config.scaling_pass_value
        self.softmax = TemperatureScaledSoftmax(config.softmax_temperature)
        outputs = n_classes * n_layers if config.layerwise_scalings else n_classes
        sizes = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            if i > 0:
                layers.append(nn.ReLU())
                if config.xlora_dropout_p > 0.0:
                    layers.append(nn.Dropout(p=config.xlora_dropout_p))
            layers.append(_linear(inner, outer).to(device=device, dtype=self.dtype))
        self.layers = nn.Sequential(*layers)

    def make_dummy_scalings(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Equal weights for the pass that the hidden states come from.

        Args:
            input_ids: Token ids `[batch, length]`.
            inputs_embeds: Embeddings `[batch, length, hidden]` in their place.
            *args, **kwargs: Not used.
        """
        inputs = inputs_embeds if input_ids is None else input_ids
        shape = (*inputs.shape[:2], self.n_layers, self.n_classes)
        return torch.full(shape, float(self.override_scaling_pass_value), dtype=self.dtype, device=inputs.device)

    def forward(
        self,
        result: Any,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The weights `[batch, length, layers, experts]`.

        Args:
            result: The base model's output, with its hidden states.
            input_ids, inputs_embeds: The input, as it was given to the base model.
            *args, **kwargs: Not used.
        """
        hidden = result.hidden_states[-1]
        weight = self.layers[0].weight
        logits = self.layers(hidden.to(device=weight.device, dtype=weight.dtype))
        if self.config.layerwise_scalings:
            logits = logits.unflatten(-1, (self.n_layers, self.n_classes))
        else:
            logits = logits.unsqueeze(2).expand(-1, -1, self.n_layers, -1)
        scalings = self.softmax(logits) if self.config.enable_softmax else logits
        if self.scalings_logging:
            self.log_scalings.append(scalings.detach())
        return scalings

    def bucketed_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """The log by length: the passes' numbers, and their weights."""
        buckets: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for number, scalings in enumerate(self.log_scalings):
            numbers, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            numbers.append(number)
            tensors.append(scalings)
        return buckets


def _linear(inner: int, outer: int) -> nn.Linear:
    """A linear layer; one without outputs, where there are no experts, has nothing to start from."""
    if outer:
        return nn.Linear(inner, outer)
    layer = nn.Linear(inner, 1)
    layer.out_features = 0
    layer.weight, layer.bias = nn.Parameter(torch.empty(0, inner)), nn.Parameter(torch.empty(0))
    return layer
