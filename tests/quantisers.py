# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The libraries that store weights packed, asked directly: what they make of a matrix, and what they read back.

Nothing here imports peft, as in cases.py; each library is imported when one of its layers is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Quantiser:
    """One library.

    Args:
        package: What has to be installed.
        build: Makes a layer of it from a float32 `nn.Linear` and a `cases.Format`.
        dense: The weight `[out, in]` of a layer, as the library itself reads it.
        requantised: What storing a matrix in a layer's format leaves of it, from the matrix, the layer and the format.
        mark: The attribute by which transformers marks a model that it loaded so.
        move: Moves a model of one such layer, `body`, to a device.
    """

    package: str
    build: Callable[[nn.Linear, Any], nn.Module]
    dense: Callable[[nn.Module], torch.Tensor]
    requantised: Callable[[torch.Tensor, nn.Module, Any], torch.Tensor]
    mark: str | None = None
    move: Callable[[nn.Module, str], nn.Module] = lambda model, device: model.to(device)


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------
def _build_4bit(linear: nn.Linear, form: Any) -> nn.Module:
    import bitsandbytes as bnb

    options = {"compute_dtype": form.dtype, "quant_type": form.quant, "compress_statistics": form.nested}
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
    layer.load_state_dict(linear.state_dict())
    return layer


def _dense_4bit(base: nn.Module) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(base.weight.data, base.weight.quant_state)


def _requantised_4bit(matrix: torch.Tensor, base: nn.Module, form: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    state = base.weight.quant_state
    options = {"blocksize": state.blocksize, "compress_statistics": form.nested, "quant_type": form.quant}
    return bnb.dequantize_4bit(*bnb.quantize_4bit(matrix.to(state.dtype), **options))


def _build_8bit(linear: nn.Linear, form: Any) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer


def _dense_8bit(base: nn.Module) -> torch.Tensor:
    scales = base.weight.SCB if base.weight.SCB is not None else base.state.SCB
    data = base.weight.data if base.state.CB is None else base.state.CB
    return data.double() * scales.double()[:, None] / 127


def _requantised_8bit(matrix: torch.Tensor, base: nn.Module, form: Any) -> torch.Tensor:
    scale = matrix.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(matrix / scale) * scale


# ---- hqq -------------------------------------------------------------------------------------------------------------
def _build_hqq(linear: nn.Linear, form: Any) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(**form.settings)
    return HQQLinear(linear, config, compute_dtype=form.dtype, device=str(linear.weight.device))


def _move_hqq(model: nn.Module, device: str) -> nn.Module:
    model.body.cuda(device)  # which moves to any device; its `to` does nothing
    return model


def _requantised_hqq(matrix: torch.Tensor, base: nn.Module, form: Any) -> torch.Tensor:
    linear = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.float())
    return _build_hqq(linear, form).dequantize()


FOUR_BIT = Quantiser("bitsandbytes", _build_4bit, _dense_4bit, _requantised_4bit, "is_loaded_in_4bit")
QUANTISERS = {
    "nf4": FOUR_BIT,
    "fp4": FOUR_BIT,
    "int8": Quantiser("bitsandbytes", _build_8bit, _dense_8bit, _requantised_8bit, "is_loaded_in_8bit"),
    "hqq": Quantiser("hqq", _build_hqq, lambda base: base.dequantize(), _requantised_hqq, move=_move_hqq),
}
