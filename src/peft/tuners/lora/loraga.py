# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What LoRA-GA (Wang et al., arXiv 2407.05000) needs before an adapter is made: gradients of the layers' weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.utils.atomic import write_atomically

from .inits.calibration import linear_targets, model_device
from .inits.loraga import GRADIENT

if TYPE_CHECKING:
    from .config import LoraConfig


def get_target_modules(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the linear layers that the config targets."""
    return linear_targets(model, config)


def get_model_device(model: nn.Module) -> str:
    """Type of the device of the model's parameters."""
    return model_device(model)


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Leave the gradient of its weight on every layer that the config targets, for `get_peft_model` to start from.

    Args:
        model: Base model. Its `requires_grad` flags and `grad`s are left as they were.
        lora_config: The adapter's config.
        train_step: Runs forward and backward passes over sample data; the gradients are averaged over the backward
            passes.
        cache_file: Where the gradients are kept: read if it exists, written else.

    Raises:
        ValueError: `cache_file` lacks a layer, or `train_step` reaches none, or a weight cannot have gradients.
    """
    if cache_file is not None and os.path.exists(cache_file):
        state = torch.load(cache_file, map_location="cpu", weights_only=True)
        for name, layer in linear_targets(model, lora_config):
            key = f"{name}.{GRADIENT}"
            if key not in state:
                raise ValueError(f"cache_file={cache_file!r} has no {key}: it is another model's or config's.")
            setattr(layer, GRADIENT, state[key].to(layer.weight.device))
        return
    estimate_gradients(model, lora_config, train_step)
    if cache_file is not None:
        state = {f"{name}.{GRADIENT}": getattr(layer, GRADIENT) for name, layer in linear_targets(model, lora_config)}
        write_atomically(cache_file, lambda temporary: torch.save(state, temporary))


def estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None]) -> None:
    """Run `train_step` and leave the mean gradient `[out, in]`, as the layer stores its weight, on every target.

    A weight's gradient is added up and freed as soon as it is there, so that only one whole set is ever held.
    """
    layers = dict(linear_targets(model, lora_config))
    for name, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ValueError(
                f"{name} stores its weight as {layer.weight.dtype}, which has no gradient: run preprocess_loraga on the "
                "model before it is quantised, with a cache_file, and load that."
            )
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str) -> Callable[[torch.Tensor], None]:
        def add(parameter: torch.Tensor) -> None:
            gradient = parameter.grad.detach().float()
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()
            counts[name] += 1
            parameter.grad = None

        return add

    with _only_these_trained(model, layers):
        handles = [layer.weight.register_post_accumulate_grad_hook(watch(name)) for name, layer in layers.items()]
        try:
            train_step()
        finally:
            for handle in handles:
                handle.remove()
    unreached = [name for name in layers if not counts[name]]
    if unreached:
        raise ValueError(f"train_step gave {unreached[0]} no gradient: it must call backward() on the model's loss.")
    for name, layer in layers.items():
        setattr(layer, GRADIENT, sums[name] / counts[name])


@contextmanager
def _only_these_trained(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Require gradients of the layers' weights alone; put flags and gradients back afterwards."""
    before: list[tuple[nn.Parameter, bool, Any]] = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(layer.weight) for layer in layers.values()}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
