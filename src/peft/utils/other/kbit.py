# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Preparing quantised base models for training, and what is known of their quantisation."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from peft.import_utils import is_gptqmodel_available
from peft.utils.warning import PeftWarning

# Formats whose kernels want the rest of the model left in its dtype.
_KEEP_DTYPE = frozenset(("gptq", "aqlm", "eetq", "hqq", "torchao"))


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantised base model and make the parts that were not quantised safe to train through.

    Half-precision parameters that are not packed (norms, embeddings, the output layer) become float32, but for
    formats whose kernels depend on the dtype (GPTQ, AQLM, EETQ, HQQ, torchao).

    Args:
        model: Base model; it is changed in place and returned.
        use_gradient_checkpointing: Switch gradient checkpointing on if the model is quantised.
        gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`. Unless they say
            `use_reentrant=False`, the embedding's output is made to require gradients, without which reentrant
            checkpoints of a frozen model have none.
        auto_clear_cache: Give the memory of the former half-precision parameters back to the device.
    """
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    in_kbit = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method not in _KEEP_DTYPE:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing and (in_kbit or method in _KEEP_DTYPE):
        _enable_checkpointing(model, gradient_checkpointing_kwargs or {})
    if auto_clear_cache:
        clear_device_cache(garbage_collection=True)
    return model


def _enable_checkpointing(model: nn.Module, kwargs: dict) -> None:
    if kwargs.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad_of_output)
    enable = model.gradient_checkpointing_enable
    if "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters:
        enable(gradient_checkpointing_kwargs=kwargs)
        return
    if kwargs:
        warnings.warn(
            f"gradient_checkpointing_kwargs={kwargs!r} is ignored: gradient_checkpointing_enable of "
            f"{type(model).__name__} takes no such argument.",
            PeftWarning,
            stacklevel=3,
        )
    enable()


def _require_grad_of_output(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    output.requires_grad_(True)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Put frozen parameters into `dtype` and trainable ones into float32, in place.

    Args:
        model: Model to change.
        dtype: Half-precision dtype in which training runs.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def get_quantization_config(model: nn.Module, method: str) -> Any | None:
    """The quantisation config of a model quantised by `method` (such as "gptq"); None for other models."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def get_gptqmodel_quant_linear(gptq_quantization_config: Any | None, device_map: Any | None = None) -> type | None:
    """The class of linear layer that GPTQModel uses for a quantisation config.

    Args:
        gptq_quantization_config: GPTQ config of a model, or None.
        device_map: Device map of the model; some kernels run on some devices only.

    Returns:
        None where there is no config or GPTQModel is not installed.
    """
    if gptq_quantization_config is None or not is_gptqmodel_available():
        return None
    from gptqmodel.quantization import METHOD
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    config = gptq_quantization_config
    return hf_select_quant_linear_v2(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        format=getattr(config, "format", None) or getattr(config, "checkpoint_format", "gptq"),
        quant_method=METHOD.GPTQ,
        meta=getattr(config, "meta", None),
        pack=False,
        device_map=device_map,
        backend=getattr(config, "backend", "auto"),
    )


def _gptqmodel_classes(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__ if cls.__module__.split(".")[0] == "gptqmodel"]


def is_gptqmodel_quant_linear(module: nn.Module) -> bool:
    """Whether a layer is one of GPTQModel's quantised linear layers, told by its classes' names."""
    return "BaseQuantLinear" in _gptqmodel_classes(module)


def is_gptqmodel_awq_layer(module: nn.Module) -> bool:
    """Whether a layer is one of GPTQModel's linear layers in the AWQ format, told by its classes' names."""
    names = _gptqmodel_classes(module)
    return "BaseQuantLinear" in names and any("awq" in name.lower() for name in names)
