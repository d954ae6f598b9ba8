# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The public protocol of quantisation backends: what an adapter layer asks about a quantised base layer. The formats
themselves are read and written in `peft.weights`; these are faces of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from peft.weights import find_weight
from peft.weights.torchao import is_torchao_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LayerType = Literal["linear", "embedding", "conv2d"]


class QuantizationBackend(ABC):
    """What a storage format can do for the adapter layer around a quantised base layer.

    Attributes:
        layer_type: Kind of the layers that the format quantises.
        backend_name: Name of the format, for messages and `repr`.
        supports_merge: Adapters can be merged into the weight.
    """

    layer_type: LayerType
    backend_name: str = ""
    supports_merge: bool = False

    @abstractmethod
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The dequantised weight [out, in] of the base layer."""

    @abstractmethod
    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        """Quantise `weight_data` [out, in] again and store it in the base layer of `peft_layer`."""

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output in a form that may be added to in place."""
        return x


class _StoredBackend(QuantizationBackend):
    """A format that `peft.weights` reads and writes."""

    layer_type: LayerType = "linear"
    supports_merge = True

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return find_weight(base_layer).dense()

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        find_weight(peft_layer.get_base_layer()).write(weight_data)


class Bnb4bitBackend(_StoredBackend):
    """bitsandbytes' `Linear4bit`."""

    layer_type: LayerType = "linear"
    backend_name = "bnb 4bit"
    supports_merge = True

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """A copy: bitsandbytes' autograd function may hand out a view, which autograd forbids to change in place."""
        return x.clone()


class Bnb8bitBackend(_StoredBackend):
    """bitsandbytes' `Linear8bitLt`."""

    layer_type: LayerType = "linear"
    backend_name = "bnb 8bit"
    supports_merge = True


class HqqBackend(_StoredBackend):
    """HQQ's `HQQLinear`."""

    layer_type: LayerType = "linear"
    backend_name = "hqq"
    supports_merge = True


class TorchaoBackend(_StoredBackend):
    """Linear layers whose weight is a torchao tensor.

    Args:
        get_apply_tensor_subclass: Gives the torchao configuration to quantise with; transformers' `TorchAoConfig` has a
            method of this name. None: a weight is quantised anew by what its tensor says of itself.
    """

    layer_type: LayerType = "linear"
    backend_name = "torchao"
    supports_merge = True

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any] | None) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        if self.get_apply_tensor_subclass is None:
            super().set_base_weight(peft_layer, weight_data)
            return
        from torchao.quantization import quantize_

        base_layer = peft_layer.get_base_layer()
        # Quantised apart, so that the layer keeps what it has should torchao refuse.
        fresh = _linear_around(weight_data.to(base_layer.weight.device, base_layer.weight.dtype))
        quantize_(fresh, self.get_apply_tensor_subclass())
        base_layer.weight = nn.Parameter(fresh.weight, requires_grad=False)


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A format whose layers only compute: adapters run beside them and cannot be merged.

    Args:
        backend_name: Name of the format.
    """

    layer_type: LayerType = "linear"
    supports_merge = False

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        raise TypeError(
            f"the weight of a {type(base_layer).__name__} cannot be read: {self.backend_name or 'this format'} only "
            "computes forward passes"
        )

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        raise TypeError(
            f"the weight of a {type(peft_layer.get_base_layer()).__name__} cannot be written: "
            f"{self.backend_name or 'this format'} only computes forward passes, so adapters cannot be merged into it"
        )


def _linear_around(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


# The package that a layer class comes from, and the name of its format.
_FORWARD_ONLY = {"gptqmodel": "gptq", "aqlm": "aqlm", "eetq": "eetq", "neural_compressor": "inc"}


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The backend of a base layer, told by the names of its classes; None where it is not quantised.

    Args:
        base_layer: The base layer itself.
        kwargs: Further arguments of the adapter layer; `get_apply_tensor_subclass` is used for torchao.
    """
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(base_layer).__mro__}
    if "bitsandbytes.Linear4bit" in names:
        return Bnb4bitBackend()
    if "bitsandbytes.Linear8bitLt" in names:
        return Bnb8bitBackend()
    if "hqq.HQQLinear" in names:
        return HqqBackend()
    if is_torchao_tensor(getattr(base_layer, "weight", None)):
        return TorchaoBackend(kwargs.get("get_apply_tensor_subclass"))
    for name in names:
        package, _, kind = name.partition(".")
        if package in _FORWARD_ONLY:
            return ForwardOnlyQuantizationBackend("awq" if "Awq" in kind else _FORWARD_ONLY[package])
    return None


def get_quantization_kwargs(model: PreTrainedModel | nn.Module) -> dict[str, Any]:
    """What adapter layers of a quantised model need to know of its configuration, as keyword arguments.

    Returns:
        `{"get_apply_tensor_subclass": ...}` for a model that transformers quantised with torchao, else nothing.
    """
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    make = getattr(config, "get_apply_tensor_subclass", None)
    return {} if make is None else {"get_apply_tensor_subclass": make}


def quantization_extra_repr(module: nn.Module) -> str:
    """The part of a layer's `repr` that names its quantisation backend; empty where it has none."""
    backend = getattr(module, "quantization_backend", None)
    return "" if backend is None else f"quantization_backend={backend.backend_name!r}"
