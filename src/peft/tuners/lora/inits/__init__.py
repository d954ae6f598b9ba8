# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Starting values of A and B, one file an idea; `init_lora_weights` chooses."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from peft.utils.integrations import gather_params_ctx
from peft.utils.warning import PeftWarning

from .corda import begin_corda
from .loftq import begin_loftq
from .loraga import begin_lora_ga
from .mica import begin_mica
from .olora import begin_olora
from .orthogonal import begin_orthogonal
from .pissa import begin_pissa
from .plain import reset_embedding, reset_linear

if TYPE_CHECKING:
    from ..config import LoraConfig
    from ..layer.base import LoraLayer

# The layer's method that does it, by the value of init_lora_weights, given the layer, the adapter and its config.
_STARTS = {
    "pissa": lambda layer, name, config: layer.pissa_init(name, config.init_lora_weights),
    "olora": lambda layer, name, config: layer.olora_init(name),
    "orthogonal": lambda layer, name, config: layer.orthogonal_init(name),
    "mica": lambda layer, name, config: layer.mica_init(name),
    "loftq": lambda layer, name, config: layer.loftq_init(name, config),
    "corda": lambda layer, name, config: layer.corda_init(name, config.init_lora_weights),
    "lora_ga": lambda layer, name, config: layer.lora_ga_init(name, config.lora_ga_config),
    "eva": lambda layer, name, config: torch.nn.init.zeros_(layer.factors(name)[1]),
}
STARTS = frozenset(_STARTS)


def start(layer: LoraLayer, name: str, config: LoraConfig) -> None:
    """Give a new adapter its starting values.

    Args:
        layer: Layer that owns the adapter.
        name: Adapter to fill.
        config: Its settings; `init_lora_weights` chooses. "eva" starts at zero, until
            `initialize_lora_eva_weights` fills A.

    Raises:
        ValueError: `init_lora_weights` is none of the known values or not possible on this kind of layer.
    """
    kind = config.init_lora_weights
    key = str(kind).lower()
    if key.startswith("pissa_niter_"):
        key = "pissa"
    begin = _STARTS.get(key)
    if begin is None:
        layer.reset_lora_parameters(name, kind)
    elif key in layer.known_starts:
        if layer.norm_weight().device.type != "meta":  # such a weight has no values: all will be loaded
            base_layer = layer.get_base_layer()
            with gather_params_ctx(base_layer.parameters()), torch.no_grad():
                begin(layer, name, config)
    elif key in layer.plain_starts:
        warnings.warn(
            f"init_lora_weights={kind!r} does not apply to {type(layer).__name__} layers; they start as with True.",
            PeftWarning,
            stacklevel=2,
        )
        layer.reset_lora_parameters(name, True)
    else:
        raise ValueError(
            f"init_lora_weights={kind!r} is not possible on {type(layer.get_base_layer()).__name__}: use True, False or "
            "'gaussian', or leave the layer out of target_modules."
        )


def reset_parameters(layer: LoraLayer, name: str, init_lora_weights: bool | str | None) -> None:
    """Fill one adapter's factors with starting values that depend on nothing else.

    Args:
        layer: Layer that owns the adapter.
        name: Adapter to fill.
        init_lora_weights: True for B = 0 and a uniform A, "gaussian" for B = 0 and a normal A, False to leave both as
            they are: in a new adapter random, so that it changes the output from the start.

    Raises:
        ValueError: `init_lora_weights` is something else.
    """
    if init_lora_weights is False or init_lora_weights is None:
        return
    if init_lora_weights is not True and str(init_lora_weights).lower() != "gaussian":
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} is not known; use True, False, 'gaussian' or, in a config, one of "
            f"{', '.join(map(repr, _STARTS))}, 'pissa_niter_N'."
        )
    if name in layer.lora_A:
        reset_linear(layer.lora_A[name], layer.lora_B[name], layer.r[name], init_lora_weights)
    elif name in layer.lora_embedding_A:
        reset_embedding(layer.lora_embedding_A[name], layer.lora_embedding_B[name])


__all__ = [
    "STARTS",
    "begin_corda",
    "begin_loftq",
    "begin_lora_ga",
    "begin_mica",
    "begin_olora",
    "begin_orthogonal",
    "begin_pissa",
    "reset_parameters",
    "start",
]
