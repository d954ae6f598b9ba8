# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Combining the weights of several adapters: task arithmetic (arXiv 2212.04089), TIES (arXiv 2306.01708), DARE (arXiv
2311.03099) and magnitude pruning."""

from __future__ import annotations

from typing import Literal

import torch


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Give `weights` `[tasks]` the trailing dimensions with which it multiplies `task_tensors` `[tasks, ...]`."""
    return weights.reshape(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the entries largest in magnitude and set the others to zero.

    Args:
        tensor: Tensor of any shape.
        density: Share of entries to keep, between 0 and 1; the number is rounded down.
    """
    kept = int(density * tensor.numel())
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[tensor.abs().reshape(-1).topk(kept).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep each entry with probability `density` and set the others to zero (the "drop" of DARE).

    Args:
        tensor: Tensor of any shape.
        density: Probability with which an entry is kept, between 0 and 1.
        rescale: Divide what is kept by `density`, so that the expectation stays the same.
    """
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale and density > 0 else kept


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """Set the smallest, or random, entries of a tensor to zero.

    Args:
        tensor: Tensor of any shape.
        density: Share of entries to keep, between 0 and 1; at 1 the tensor itself is returned.
        method: "magnitude" or "random".
        rescale: For "random", divide what is kept by `density`.

    Raises:
        ValueError: `density` lies outside 0 to 1 or `method` is unknown.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} must lie between 0 and 1.")
    if method not in ("magnitude", "random"):
        raise ValueError(f"method={method!r} is unknown: use 'magnitude' or 'random'.")
    if density == 1:
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale=rescale)


def calculate_majority_sign_mask(
    tensor: torch.Tensor, method: Literal["total", "frequency"] = "total"
) -> torch.Tensor:
    """Where the entries of the tasks have the sign that most of them agree on (the "elect" of TIES).

    Args:
        tensor: Stacked task tensors `[tasks, ...]`.
        method: "total" weighs each task by magnitude, "frequency" counts tasks.

    Returns:
        A mask of the shape of `tensor`.

    Raises:
        ValueError: `method` is unknown.
    """
    signs = tensor.sign()
    if method == "total":
        votes = tensor.sum(dim=0)
    elif method == "frequency":
        votes = signs.sum(dim=0)
    else:
        raise ValueError(f"method={method!r} is unknown: use 'total' or 'frequency'.")
    majority = torch.where(votes >= 0, 1, -1)
    return signs == majority


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tasks, for each entry, of those that have the elected sign; zero where none has.

    Args:
        task_tensors: Stacked task tensors `[tasks, ...]`.
        majority_sign_mask: Mask of the same shape.
    """
    total = (task_tensors * majority_sign_mask).sum(dim=0)
    return total / majority_sign_mask.sum(dim=0).clamp(min=1)


def _weighted(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The tasks stacked, each times its weight."""
    stacked = torch.stack(task_tensors)
    return stacked * reshape_weight_task_tensors(stacked, weights)


def task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the tasks.

    Args:
        task_tensors: One tensor a task, all of one shape.
        weights: Weights `[tasks]`.
    """
    return _weighted(task_tensors, weights).sum(dim=0)


def magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Weighted sum of the tasks, each reduced to its entries largest in magnitude.

    Args:
        task_tensors: One tensor a task, all of one shape.
        weights: Weights `[tasks]`.
        density: Share of entries to keep, between 0 and 1.
    """
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def ties(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, majority_sign_method: Literal["total",
    "frequency"] = "total",
) -> torch.Tensor:  # fmt: skip
    """Trim each task to its largest entries, elect a sign for each entry, and average those that have it (TIES).

    Args:
        task_tensors: One tensor a task, all of one shape.
        weights: Weights `[tasks]`; they do not take part in the election.
        density: Share of entries to keep, between 0 and 1.
        majority_sign_method: "total" or "frequency".
    """
    trimmed = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    mask = calculate_majority_sign_mask(torch.stack(trimmed), method=majority_sign_method)
    return disjoint_merge(_weighted(trimmed, weights), mask)


def dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Weighted sum of the tasks, of each of which random entries are dropped and the others scaled up (DARE).

    Args:
        task_tensors: One tensor a task, all of one shape.
        weights: Weights `[tasks]`.
        density: Probability with which an entry is kept, between 0 and 1.
    """
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def dare_ties(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, majority_sign_method: Literal["total",
    "frequency"] = "total",
) -> torch.Tensor:  # fmt: skip
    """TIES, with entries dropped at random and the others scaled up (DARE) in place of trimming.

    Args:
        task_tensors: One tensor a task, all of one shape.
        weights: Weights `[tasks]`; they do not take part in the election.
        density: Probability with which an entry is kept, between 0 and 1.
        majority_sign_method: "total" or "frequency".
    """
    dropped = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    mask = calculate_majority_sign_mask(torch.stack(dropped), method=majority_sign_method)
    return disjoint_merge(_weighted(dropped, weights), mask)
