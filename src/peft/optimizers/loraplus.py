# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA+ (Hayou, Ghosh and Yu 2024, arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with groups of their own for A, for B, and for adapters of embeddings.

    What has one dimension (biases, DoRA magnitudes) learns with B, everything else with A. Biases and norms are never
    decayed.

    Args:
        model: Model with LoRA adapters.
        optimizer_cls: Class of the optimizer.
        lr: Learning rate of A.
        loraplus_lr_ratio: Learning rate of B over that of A; the paper recommends 16 or more.
        **kwargs: Arguments of the optimizer, and
            loraplus_weight_decay: Weight decay; that of `weight_decay` if it is not given, 0 without either.
            loraplus_lr_embedding: Learning rate of LoRA on embeddings, 1e-6 by default.

    Raises:
        ValueError: `loraplus_lr_ratio` is not positive.
    """
    if not loraplus_lr_ratio > 0:
        raise ValueError(f"loraplus_lr_ratio={loraplus_lr_ratio} must be positive; the paper recommends 16 or more.")
    options = dict(kwargs)
    weight_decay = options.pop("loraplus_weight_decay", options.pop("weight_decay", 0.0))
    options.pop("weight_decay", None)
    embedding_lr = options.pop("loraplus_lr_embedding", 1e-6)
    groups = _split(model)
    rate_b = lr * loraplus_lr_ratio
    optimizer = optimizer_cls(
        [
            {"params": groups["A"], "weight_decay": weight_decay, "lr": lr},
            {"params": groups["embedding"], "weight_decay": weight_decay, "lr": embedding_lr},
            {"params": groups["B"], "weight_decay": weight_decay, "lr": rate_b},
            {"params": groups["B without decay"], "weight_decay": 0.0, "lr": rate_b},
        ],
        lr=lr,
        **options,
    )
    if optimizer_cls.__module__.split(".")[0] == "bitsandbytes":
        _keep_embeddings_in_32_bit(model)
    return optimizer


def _split(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if "lora_embedding_" in name:
                groups["embedding"].append(parameter)
            elif "lora_B" in name or parameter.dim() == 1:
                groups["B without decay" if is_norm or "bias" in name else "B"].append(parameter)
            else:
                groups["A"].append(parameter)
    return groups


def _keep_embeddings_in_32_bit(model: nn.Module) -> None:
    """The 8-bit state of bitsandbytes is too coarse for the uneven gradients of embeddings."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
