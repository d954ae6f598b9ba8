# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Intruder dimensions (Shuttleworth et al., arXiv 2410.21228): large singular vectors that only the adapter brought in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .inits.base_weight import read_matrix, set_factors
from .layer import Embedding, LoraLayer
from .layer.linear import LoraLinearBase

if TYPE_CHECKING:
    from peft.peft_model import PeftModel


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], None] | None = print,
) -> None:
    """Create and activate a copy of a LoRA adapter whose intruder dimensions are scaled down, so that less is forgotten.

    A left singular vector of the tuned weight W + s·BA, among those of the `top_k` largest singular values, is an
    intruder if its cosine to each of W's is below `threshold_epsilon`. Each gives up a share of 1 − `mitigation_lambda`;
    what the adapter then adds is cut to its rank again.

    Args:
        peft_model: Model with the adapter.
        old_adapter_name: The adapter to copy.
        new_adapter_name: Name of the copy.
        top_k: How many singular vectors of each layer to look at.
        threshold_epsilon: Cosine, in [0, 1], below which a vector is an intruder.
        mitigation_lambda: What is left of an intruder: 1 all of it, 0 nothing.
        logging_sink: Called with one line a layer; None for silence.

    Raises:
        ValueError: The adapter does not exist, is no plain LoRA adapter, or the new name is taken.
    """
    config = _check(peft_model, old_adapter_name, new_adapter_name)
    log = logging_sink or (lambda line: None)
    # False: a start that reads the base weight would change it a second time
    peft_model.add_adapter(new_adapter_name, replace(copy.deepcopy(config), init_lora_weights=False))
    total = 0
    for name, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer) or not layer.has_adapter(old_adapter_name):
            continue
        _copy(layer, old_adapter_name, new_adapter_name)
        if isinstance(layer, LoraLinearBase):
            found = _reduce(layer, old_adapter_name, new_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
            log(f"{name}: {found} intruder dimensions")
            total += found
    log(f"Reduced {total} intruder dimensions of adapter {old_adapter_name!r} in {new_adapter_name!r}.")
    peft_model.set_adapter(new_adapter_name)


def _check(peft_model: PeftModel, old: str, new: str):
    configs = peft_model.peft_config
    if old not in configs:
        raise ValueError(f"There is no adapter {old!r}; present: {', '.join(configs)}.")
    if new in configs:
        raise ValueError(f"new_adapter_name={new!r}: there is an adapter of that name already.")
    layers = [layer for layer in peft_model.modules() if isinstance(layer, LoraLayer) and layer.has_adapter(old)]
    if not layers:
        raise ValueError(f"Adapter {old!r} is not a LoRA adapter: intruder dimensions are those of BA.")
    for layer in layers:
        variant = layer.lora_variant.get(old)
        if variant is not None:
            raise ValueError(
                f"Adapter {old!r} is a {type(variant).__name__}: intruder dimensions are reduced in plain LoRA adapters "
                "alone."
            )
    return configs[old]


def _copy(layer: LoraLayer, old: str, new: str) -> None:
    if isinstance(layer, Embedding):
        pairs = zip(layer.factors(old), layer.factors(new), strict=True)
    else:
        pairs = ((getattr(layer, slot)[old].weight, getattr(layer, slot)[new].weight) for slot in ("lora_A", "lora_B"))
    for source, target in pairs:
        target.copy_(source)
    bias = layer.low_rank_bias(new)
    if bias is not None:
        bias.copy_(layer.low_rank_bias(old))
    layer.scaling[new] = layer.scaling[old]


def _reduce(layer: LoraLayer, old: str, new: str, top_k: int, epsilon: float, keep: float) -> int:
    """Write the reduced factors of one layer; returns how many intruders it had."""
    matrix = read_matrix(layer)
    a, b = (factor.to(matrix) for factor in layer.factors(old))
    scaling = layer.scaling[old]
    delta = scaling * (b @ a)
    own = torch.linalg.svd(matrix, full_matrices=False)[0]
    u, s, vt = torch.linalg.svd(matrix + delta, full_matrices=False)
    largest = (own.t() @ u[:, :top_k]).abs().amax(0)
    intruders = (largest < epsilon).nonzero().flatten()
    if not len(intruders):
        return 0
    delta = delta - (1 - keep) * (u[:, intruders] * s[intruders]) @ vt[intruders]
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    r = layer.r[old]
    root = (s[:r] / scaling).sqrt()
    set_factors(layer, new, root[:, None] * vt[:r], u[:, :r] * root)
    return len(intruders)
