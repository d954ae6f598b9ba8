# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""CorDA (Yang et al., arXiv 2406.05223): the adapter starts as the part of the weight that matters for given inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base_weight import read_matrix, take_out

if TYPE_CHECKING:
    from ..layer.base import LoraLayer


def begin_corda(layer: LoraLayer, name: str, kind: bool | str) -> None:
    """With W C = U S Vᵀ: B = U √(S/s), A = √(S/s) Vᵀ C⁻¹ of r singular values, W − s·BA as the base weight (section 3.2).

    Args:
        layer: Layer that owns the adapter; `peft.tuners.lora.corda.preprocess_corda` put `eigens` on its base layer.
        name: Adapter to start.
        kind: The value of `init_lora_weights`, for the message.

    Raises:
        ValueError: The base layer has no `eigens`, or they do not fit it.
    """
    base_layer = layer.get_base_layer()
    eigens = getattr(base_layer, "eigens", None)
    if eigens is None:
        raise ValueError(
            f"init_lora_weights={kind!r} needs statistics of the layer's inputs, which this layer has not: call "
            "peft.tuners.lora.corda.preprocess_corda(model, config, run_model) before the adapter is created."
        )
    matrix = read_matrix(layer)
    r = layer.r[name]
    values, u, v = (tensor.to(matrix) for tensor in (eigens.S_WC, eigens.U_WC, eigens.V_WC))
    expected = ((r,), (matrix.shape[0], r), (matrix.shape[1], r))
    if (tuple(values.shape), tuple(u.shape), tuple(v.shape)) != expected:
        raise ValueError(
            f"The layer's eigens have the shapes S {list(values.shape)}, U {list(u.shape)}, V {list(v.shape)}, but r={r} "
            f"and a weight {list(matrix.shape)} need {', '.join(map(str, map(list, expected)))}: preprocess with the same "
            "config that the adapter is created with."
        )
    root = (values / layer.scaling[name]).sqrt()
    take_out(layer, name, matrix, root[:, None] * v.t(), u * root)
    del base_layer.eigens
