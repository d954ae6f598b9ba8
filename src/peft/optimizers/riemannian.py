# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Riemannian preconditioning of LoRA (Zhang and Pilanci 2024, arXiv 2402.02347): each factor's gradient
is scaled by the other factor's inverse Gram matrix, an r by r solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .lorafa import trainable_pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer that preconditions the gradients of A and B, in place, before each of its steps.

    g_A becomes (BᵀB + reg·I)⁻¹ g_A and g_B becomes g_B (AAᵀ + reg·I)⁻¹, computed in float32. Other parameters train as
    they are.

    Args:
        model: Model with LoRA adapters.
        optimizer_cls: Class of the optimizer, such as `torch.optim.AdamW`.
        lr: Learning rate.
        reg: Regularisation of the Gram matrices; positive, since B starts at zero.
        **kwargs: Arguments of the optimizer.

    Raises:
        ValueError: `reg` is not positive, or the model has no LoRA layer with both factors trainable.
    """
    if not reg > 0:
        raise ValueError(f"reg={reg} must be positive: without it the Gram matrix of a B of zeros has no inverse.")
    pairs = [(a, b) for module in model.modules() for _, a, b in trainable_pairs(module) if a.requires_grad]
    if not pairs:
        raise ValueError(
            "The model has no lora_A and lora_B that are both trainable, so there is nothing to precondition: add a "
            "LoRA adapter, or use the optimizer without it."
        )

    def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            precondition(pairs, reg)
            return None

        def preconditioned_closure() -> Any:
            loss = closure()
            precondition(pairs, reg)
            return loss

        return args[:1], {**kwargs, "closure": preconditioned_closure}

    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    optimizer.register_step_pre_hook(before_step)
    return optimizer


@torch.no_grad()
def precondition(pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
    """Precondition the gradients of pairs of A `[r, in, ...]` and B `[out, r, ...]` in place.

    Args:
        pairs: The factors; those without a gradient are left alone.
        reg: Regularisation of the Gram matrices.
    """
    for lora_a, lora_b in pairs:
        a, b = lora_a.flatten(1).float(), lora_b.flatten(1).float()
        if lora_a.grad is not None:
            solved = _solve(b.T @ b, lora_a.grad.flatten(1).float(), reg)
            lora_a.grad.copy_(solved.reshape(lora_a.shape))
        if lora_b.grad is not None:
            solved = _solve(a @ a.T, lora_b.grad.flatten(1).float().T, reg).T
            lora_b.grad.copy_(solved.reshape(lora_b.shape))


def _solve(gram: torch.Tensor, right: torch.Tensor, reg: float) -> torch.Tensor:
    """(gram + reg·I)⁻¹ right."""
    gram.diagonal().add_(reg)
    return torch.linalg.solve_ex(gram, right).result
