# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA-GA (Wang et al., arXiv 2407.05000): the adapter starts along the singular vectors of the weight's gradient."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from peft.utils.warning import PeftWarning

from .base_weight import read_matrix, take_out

if TYPE_CHECKING:
    from ..config import LoraGAConfig
    from ..layer.base import LoraLayer

GRADIENT = (
    "_peft_loraga_grad"  # attribute of a base layer: the averaged gradient of its weight, as the layer stores it
)
_OVERSAMPLING = 4


def begin_lora_ga(layer: LoraLayer, name: str, config: LoraGAConfig | None) -> None:
    """B = U S and A = Vᵀ of r singular triplets each of the gradient, scaled, and W − s·BA as the base weight.

    Args:
        layer: Layer that owns the adapter; `peft.tuners.lora.loraga.preprocess_loraga` left the gradient on its base
            layer. Without one the adapter starts as with `init_lora_weights=True`, and a warning says so.
        name: Adapter to start.
        config: `direction` chooses the triplets among the first 2r: "ArBr" the odd ones for A and the even ones for B,
            "A2rBr" the second half for A, "ArB2r" the second half for B, "random" the same random ones for both.
            `scale`: "stable" multiplies B by out^¼ / √stable_gamma, "gd_scale" divides A and B by the scaling,
            "weight_svd" gives B the spectral norm of W, "unit" leaves both.

    Raises:
        ValueError: The weight has fewer than 2r singular values, or `direction` or `scale` is unknown.
    """
    base_layer = layer.get_base_layer()
    gradient = getattr(base_layer, GRADIENT, None)
    if gradient is None:
        warnings.warn(
            f"init_lora_weights='lora_ga': {type(base_layer).__name__} has no gradient, so adapter {name!r} starts as "
            "with True. Call peft.tuners.lora.loraga.preprocess_loraga(model, config, train_step) first.",
            PeftWarning,
            stacklevel=2,
        )
        layer.reset_lora_parameters(name, True)
        return
    if config is None:
        from ..config import LoraGAConfig

        config = LoraGAConfig()
    matrix = read_matrix(layer)
    gradient = gradient.to(matrix)
    if layer.fan_in_fan_out:
        gradient = gradient.t()
    r = layer.r[name]
    if 2 * r > min(matrix.shape):
        raise ValueError(
            f"init_lora_weights='lora_ga' needs 2r singular vectors: r={r} is too much for a weight "
            f"{list(matrix.shape)}. Lower r to {min(matrix.shape) // 2}, for this layer alone by rank_pattern."
        )
    u, s, v = torch.svd_lowrank(gradient, q=min(_OVERSAMPLING * r, *matrix.shape), niter=4)
    for_a, for_b = _triplets(config.direction, r)
    a, b = v[:, for_a].t(), u[:, for_b] * s[for_b]
    a, b = _scaled(a, b, config, layer.scaling[name], matrix)
    take_out(layer, name, matrix, a, b)
    delattr(base_layer, GRADIENT)


def _triplets(direction: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the singular triplets that A and B come from."""
    if direction == "ArBr":
        return torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    if direction == "A2rBr":
        return torch.arange(r, 2 * r), torch.arange(r)
    if direction == "ArB2r":
        return torch.arange(r), torch.arange(r, 2 * r)
    if direction == "random":
        chosen = torch.randperm(2 * r)[:r]
        return chosen, chosen
    raise ValueError(f"direction={direction!r}: use 'ArBr', 'A2rBr', 'ArB2r' or 'random'.")


def _scaled(
    a: torch.Tensor, b: torch.Tensor, config: LoraGAConfig, scaling: float, matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if config.scale == "unit":
        return a, b
    if config.scale == "gd_scale":
        return a / scaling, b / scaling
    if config.scale == "stable":
        return a, b * (b.shape[0] ** 0.25 / config.stable_gamma**0.5)
    if config.scale == "weight_svd":
        largest = torch.svd_lowrank(matrix, q=min(2 * b.shape[1], *matrix.shape), niter=4)[1][0]
        return a, b * (largest / b.norm(dim=0).max())
    raise ValueError(f"scale={config.scale!r}: use 'stable', 'weight_svd', 'gd_scale' or 'unit'.")
