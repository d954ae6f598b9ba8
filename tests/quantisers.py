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
        requantised: What storing a matrix in a layer's format leaves of it, from the matrix, the layer and the format;
            None where no matrix can be stored.
        mark: The attribute by which transformers marks a model that it loaded so.
        move: Moves a model of one such layer, `body`, to a device.
    """

    package: str
    build: Callable[[nn.Linear, Any], nn.Module]
    dense: Callable[[nn.Module], torch.Tensor]
    requantised: Callable[[torch.Tensor, nn.Module, Any], torch.Tensor] | None
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


# ---- gptq and awq ----------------------------------------------------------------------------------------------------
def _ranges(matrix: torch.Tensor, form: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and zero points `[out, groups]` of the rows' ranges, and the group of each column `[in]`."""
    bits, size = form.settings["bits"], form.settings["group_size"]
    columns = matrix.shape[1]
    group = torch.arange(columns) // size
    if form.settings.get("desc_act"):  # as with act-order, where neighbours are of any groups
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(11))]
    lowest, highest = (
        torch.stack([extreme(matrix[:, group == g]) for g in range(int(group.max()) + 1)], 1).float()
        for extreme in (lambda part: part.amin(1).clamp(max=0), lambda part: part.amax(1).clamp(min=0))
    )
    scales = ((highest - lowest) / (2**bits - 1)).clamp_min(1e-5).half().float()
    return scales, (-lowest / scales).round().clamp(0, 2**bits - 1), group.int()


def _build_gptq(linear: nn.Linear, form: Any) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    settings = {"desc_act": False, "sym": False, **form.settings}
    layer = TorchLinear(
        in_features=linear.in_features, out_features=linear.out_features, bias=linear.bias is not None, **settings
    )
    scales, zeros, group = _ranges(linear.weight, form)
    layer.pack_original(linear, scales, zeros, group)
    layer.scales, layer.bias = layer.scales.to(form.dtype), None if linear.bias is None else layer.bias.to(form.dtype)
    return layer.eval()


def _build_awq(linear: nn.Linear, form: Any) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = AwqTorchLinear(
        in_features=linear.in_features, out_features=linear.out_features, bias=linear.bias is not None,
        desc_act=False, sym=False, register_buffers=True, **form.settings,
    )  # fmt: skip
    scales, zeros, _ = _ranges(linear.weight, form)
    layer.pack(linear, scales, zeros)
    layer.scales, layer.bias = layer.scales.to(form.dtype), None if linear.bias is None else layer.bias.to(form.dtype)
    return layer


def _dense_awq(base: nn.Module) -> torch.Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(base.qweight, base.qzeros, base.scales, base.bits, base.group_size).T


def _requantised_groups(matrix: torch.Tensor, base: nn.Module, form: Any) -> torch.Tensor:
    """Rounding to the integers of each group's own range."""
    scales, zeros, group = _ranges(matrix, form)
    step, point = scales[:, group.long()], zeros[:, group.long()]
    return ((matrix / step + point).round().clamp(0, 2 ** form.settings["bits"] - 1) - point) * step


# ---- torchao ---------------------------------------------------------------------------------------------------------
def _build_torchao(linear: nn.Linear, form: Any) -> nn.Module:
    from torchao import quantization as ao

    settings = dict(form.settings)
    if "group_size" in settings:
        settings["granularity"] = ao.PerGroup(settings.pop("group_size"))
    layer = linear.to(form.dtype)
    ao.quantize_(layer, getattr(ao, settings.pop("config"))(**settings))
    return layer


def _requantised_torchao(matrix: torch.Tensor, base: nn.Module, form: Any) -> torch.Tensor:
    return _build_torchao(_linear_of(matrix), form).weight.dequantize()


def _linear_of(matrix: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*matrix.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.detach().float(), requires_grad=False)
    return linear


# ---- compressed-tensors ----------------------------------------------------------------------------------------------
def _build_compressed(linear: nn.Linear, form: Any) -> nn.Module:
    """A layer with its scales set from its weight, which it rounds to them in each forward pass."""
    from compressed_tensors import quantization as ct
    from compressed_tensors.quantization.utils import calculate_qparams

    args = ct.QuantizationArgs(**form.settings)
    model = nn.Sequential(linear.to(form.dtype))
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=args)
    ct.apply_quantization_config(model, ct.QuantizationConfig(config_groups={"all": scheme}))
    layer = model[0]
    blocks = layer.weight.detach().unflatten(1, (-1, args.group_size or linear.in_features))
    found = calculate_qparams(blocks.amin(2), blocks.amax(2), args)
    for name, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
        if hasattr(layer, name):
            getattr(layer, name).data.copy_(value)
    return layer.requires_grad_(False)


def _dense_compressed(base: nn.Module) -> torch.Tensor:
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    return forward_quantize(base, base.weight.data, "weight", base.quantization_scheme.weights)


def _requantised_compressed(matrix: torch.Tensor, base: nn.Module, form: Any) -> torch.Tensor:
    return _dense_compressed(_build_compressed(_linear_of(matrix), form))


# ---- aqlm ------------------------------------------------------------------------------------------------------------
def _build_aqlm(linear: nn.Linear, form: Any) -> nn.Module:
    """A layer with codes at random, which is not the linear layer's: finding codes takes a search."""
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(linear.in_features, linear.out_features, **form.settings, dtype=form.dtype)
    half = layer.codebook_size // 2
    layer.codes.data = torch.randint(-half, half, layer.codes.shape).to(layer.codes.dtype)
    for parameter in (layer.codebooks, layer.scales, layer.bias):
        parameter.data = torch.randn(parameter.shape, dtype=form.dtype) / 4
    return layer.requires_grad_(False)


def _dense_aqlm(base: nn.Module) -> torch.Tensor:
    from aqlm.utils import _dequantize_weight, unpack_int_data

    return _dequantize_weight(unpack_int_data(base.codes, base.nbits_per_codebook), base.codebooks, base.scales)


FOUR_BIT = Quantiser("bitsandbytes", _build_4bit, _dense_4bit, _requantised_4bit, "is_loaded_in_4bit")
QUANTISERS = {
    "nf4": FOUR_BIT,
    "fp4": FOUR_BIT,
    "int8": Quantiser("bitsandbytes", _build_8bit, _dense_8bit, _requantised_8bit, "is_loaded_in_8bit"),
    "hqq": Quantiser("hqq", _build_hqq, lambda base: base.dequantize(), _requantised_hqq, move=_move_hqq),
    "gptq": Quantiser("gptqmodel", _build_gptq, lambda base: base.dequantize_weight().T, _requantised_groups),
    "awq": Quantiser("gptqmodel", _build_awq, _dense_awq, _requantised_groups),
    "torchao": Quantiser("torchao", _build_torchao, lambda base: base.weight.dequantize(), _requantised_torchao),
    "compressed": Quantiser("compressed_tensors", _build_compressed, _dense_compressed, _requantised_compressed),
    "aqlm": Quantiser("aqlm", _build_aqlm, _dense_aqlm, None),
}
