# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What adapters a model carries and in which state they are, for people and for tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from peft.engine.layer import BaseTunerLayer
from peft.engine.tuner import BaseTuner
from peft.utils.other import ModulesToSaveWrapper

if TYPE_CHECKING:
    from .base import PeftModel

Names = list[str]
Irregular = Literal["irregular"]  # where layers, or parameters, do not agree
IRREGULAR: Irregular = "irregular"


@dataclass
class TunerLayerStatus:
    """State of one adapted layer.

    Attributes:
        name: Name of the layer in the tuner.
        module_type: Kind of layer, such as "lora.Linear".
        enabled: False inside `disable_adapter()`.
        active_adapters: Adapters that take part in the forward pass.
        merged_adapters: Adapters that are in the base weight now.
        requires_grad: By adapter, whether it is trained; "irregular" if only some of its parameters are.
        available_adapters: Adapters that have parameters here.
        devices: By adapter, the devices of its parameters.
        quantization_backend: Class name of the layer's quantization backend, None if it has none.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: Names
    merged_adapters: Names
    requires_grad: dict[str, bool | Irregular]
    available_adapters: Names
    devices: dict[str, Names]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """State of all adapted layers together; a field on which they disagree is "irregular".

    Attributes:
        base_model_type: Class of the base model.
        adapter_model_type: Class of the tuner, "None" if adapters were injected without one.
        peft_types: Method of each adapter.
        trainable_params: Number of parameters with `requires_grad`.
        total_params: Number of parameters.
        num_adapter_layers: Number of adapted layers.
        enabled: Whether the layers are enabled.
        active_adapters: Adapters that take part in the forward pass.
        merged_adapters: Adapters that are in the base weights now.
        requires_grad: By adapter, whether it is trained.
        available_adapters: Adapters that have parameters anywhere.
        devices: By adapter, the devices of its parameters.
        quantization_backend: As in `TunerLayerStatus`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: Names | Irregular
    merged_adapters: Names | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: Names
    devices: dict[str, Names]
    quantization_backend: str | Irregular | None


def _common(values: Iterable[Any]) -> Any:
    """The value that all agree on, or "irregular"."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else IRREGULAR


def _slot(layer: nn.Module, attribute: str) -> Any:
    """A container of adapter parameters, whose name may lead through a submodule."""
    for part in attribute.split("."):
        layer = getattr(layer, part)
    return layer


def _adapter_tensors(layer: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The trainable state of each adapter of a layer."""
    tensors: dict[str, list[torch.Tensor]] = {}
    for attribute in layer.adapter_layer_names:
        for name, entry in _slot(layer, attribute).items():
            found = entry.parameters() if isinstance(entry, nn.Module) else (entry,)
            tensors.setdefault(name, []).extend(found)
    return tensors


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module, str, dict[str, str]]:
    """The module to walk, the base model, the type of the tuner and the adapters' methods."""
    from .base import PeftModel

    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, BaseTuner):
            raise TypeError(
                f"The adapters of this model ({model.peft_type}) are not in its layers, so there is no layer status."
            )
        tuner = model.base_model
    elif isinstance(model, BaseTuner):
        tuner = model
    else:
        configs = getattr(model, "peft_config", None)
        methods = {name: method_name(config) for name, config in configs.items()} if isinstance(configs, dict) else {}
        return model, model, "None", methods
    methods = {name: method_name(config) for name, config in tuner.peft_config.items()}
    return tuner, tuner.model, type(tuner).__name__, methods


def method_name(config: Any) -> str:
    """The method of a config, or of a model, as it is written in files."""
    return getattr(config.peft_type, "value", config.peft_type)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted layer.

    Args:
        model: A `PeftModel`, a tuner, or any model with adapters injected.

    Raises:
        TypeError: The adapters are not in the layers (prompt learning), or the model mixes tuners.
        ValueError: The model has no adapted layer.
    """
    walked, _, _, _ = _parts(model)
    layers = [_layer_status(name, module) for name, module in _adapted(walked)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no adapted layer: wrap it with get_peft_model or inject_adapter_in_model first."
        )
    return layers


def _adapted(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    wrapped = (BaseTunerLayer, ModulesToSaveWrapper)  # a TrainableTokensWrapper's layer is inside it
    return ((name, module) for name, module in model.named_modules() if isinstance(module, wrapped))


def _layer_status(name: str, layer: nn.Module) -> TunerLayerStatus:
    tensors = _adapter_tensors(layer)
    backend = getattr(layer, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={key: _common(t.requires_grad for t in found) for key, found in tensors.items() if found},
        available_adapters=sorted(layer._get_available_adapters()),
        devices={key: sorted({t.device.type for t in found}) for key, found in tensors.items() if found},
        quantization_backend=None if backend is None else type(backend).__name__,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapted layers together.

    Args:
        model: A `PeftModel`, a tuner, or any model with adapters injected.

    Raises:
        TypeError: The adapters are not in the layers (prompt learning), or the model mixes tuners.
        ValueError: The model has no adapted layer.
    """
    walked, base_model, tuner_type, methods = _parts(model)
    layers = get_layer_status(model)
    trainable, total = count_parameters(walked)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    flags = {
        name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
        for name in names
        if any(name in layer.requires_grad for layer in layers)
    }
    devices = {name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in names}
    return TunerModelStatus(
        base_model_type=type(base_model).__name__,
        adapter_model_type=tuner_type,
        peft_types=methods,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=_common(sorted(layer.merged_adapters) for layer in layers),
        requires_grad=flags,
        available_adapters=names,
        devices=devices,
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable and of all parameters, packed 4-bit weights and ZeRO-3 partitions counted at full size."""
    trainable = total = 0
    for parameter in model.parameters():
        count = _full_size(parameter)
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def _full_size(parameter: nn.Parameter) -> int:
    count = parameter.numel()
    if count == 0 and hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    if type(parameter).__name__ == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
        return parameter.quant_state.shape.numel()
    return count


def trainable_summary(trainable: int, total: int) -> str:
    """One line of text on how much of a model is trained."""
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"


def has_active_enabled_adapter(model: PeftModel) -> bool:
    """Whether any adapter takes part in the forward pass now."""
    layers = [module for _, module in _adapted(model.base_model)]
    return any(not layer.disable_adapters and layer.active_adapters for layer in layers)
