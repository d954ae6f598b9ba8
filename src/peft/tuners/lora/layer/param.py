# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on a bare parameter of a module, such as the stacked weights of experts: W + s·BA while the module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.engine.layer import check_adapters_to_merge
from peft.weights.torchao import is_torchao_tensor

from .base import LoraLayer

if TYPE_CHECKING:
    from ..config import LoraConfig

# Options that have no meaning for a parameter, with the value that leaves them off.
_REFUSED = (
    ("lora_dropout", 0.0),
    ("fan_in_fan_out", False),
    ("use_dora", False),
    ("lora_bias", False),
    ("kasa_config", None),
    ("velora_config", None),
)


class _LoraParameterProxy(nn.Module):
    """What stands for a parameter while its module runs.

    Args:
        delta_weight: What adapters add to it.
    """

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta_weight.to(W)


class ParameterLayer(LoraLayer):
    """What layers share whose adapters change one parameter of the base layer while it runs."""

    parameter_name: str

    def get_param(self) -> torch.Tensor:
        """The parameter, without adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        return self.get_param()

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Let the module see the parameter with the named adapters' updates, for as long as the context is open."""
        names = [name for name in active_adapters if self.has_adapter(name)]
        if not names:
            yield
            return
        module, parameter = self.get_base_layer(), self.get_param()
        delta = sum(self.get_delta_weight(name) for name in names)
        order = list(module._parameters)
        del module._parameters[self.parameter_name]
        object.__setattr__(module, self.parameter_name, _LoraParameterProxy(delta)(parameter))
        try:
            yield
        finally:
            object.__delattr__(module, self.parameter_name)
            module._parameters[self.parameter_name] = parameter
            for name in order:  # the order of a model's parameters is part of optimizers' states
                module._parameters[name] = module._parameters.pop(name)

    # ---- merging ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _why_not_writable(self) -> str | None:
        return None  # it is a plain parameter that is written, not the weight of a layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        for name in names:
            merged = self.get_param() + self.get_delta_weight(name).to(self.get_param())
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"Merging adapter {name!r} gives values of {self.parameter_name} that are not finite (NaN or "
                    "infinity); the parameter was left as it is."
                )
            self.get_param().data.copy_(merged)
            self.merged_adapters = [*self.merged_adapters, name]

    @torch.no_grad()
    def unmerge(self) -> None:
        for name in reversed(self.merged_adapters):
            self.get_param().data.sub_(self.get_delta_weight(name).to(self.get_param()))
        self.merged_adapters = []


class ParamWrapper(ParameterLayer, nn.Module):
    """LoRA on one parameter `[out, in]` or `[experts, out, in]` of the wrapped module.

    A is `[experts · r, in]`, expert by expert; B is `[out, r · experts]`, the experts of each rank side by side. Several
    parameters of a module are several wrappers around one another.

    Args:
        base_layer: The module, possibly in the wrapper of another of its parameters.
        adapter_name: Name of the first adapter.
        parameter_name: Name of the parameter.
        config: The adapter's settings.
        r: Its rank, by expert.
        lora_alpha: Numerator of its scaling.
        is_target_conv_1d_layer: Taken for compatibility.

    Raises:
        ValueError: The module has no such parameter, it is quantised or has neither 2 nor 3 dimensions, or the config
            asks for dropout, `fan_in_fan_out`, `lora_bias` or a variant.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _features(self, base_layer: nn.Module) -> tuple[int, int]:
        parameter = getattr(base_layer, self.parameter_name, None)
        if not isinstance(parameter, torch.Tensor) or parameter.dim() not in (2, 3):
            found = list(parameter.shape) if isinstance(parameter, torch.Tensor) else type(parameter).__name__
            raise ValueError(
                f"target_parameters: {self.parameter_name} of {type(base_layer).__name__} must be a parameter of 2 or 3 "
                f"dimensions, got {found}."
            )
        if not parameter.is_floating_point() or parameter.element_size() < 2 or is_torchao_tensor(parameter):
            raise ValueError(
                f"target_parameters: {self.parameter_name} of {type(base_layer).__name__} is quantised ({type(parameter).__name__}, {parameter.dtype}), "
                "and what an adapter adds cannot be added to its codes: load the model dense (dequantize=True in its "
                "quantisation config), or leave the parameter out."
            )
        self.num_experts = parameter.shape[0] if parameter.dim() == 3 else 1
        return parameter.shape[-1], parameter.shape[-2]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        for option, off in _REFUSED:
            if getattr(config, option) not in (off, None, False):
                raise ValueError(
                    f"{option}={getattr(config, option)!r} is not possible on a parameter (target_parameters, here "
                    f"{self.parameter_name}): use {off!r}."
                )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    # ---- the updates ----------------------------------------------------------------------------------------------------
    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """B `[experts, out, r]`, A `[experts, r, in]` and the scaling, such that scaling · B A is what is added."""
        r = self.r[adapter_name]
        b = self.lora_B[adapter_name].weight.unflatten(1, (r, self.num_experts)).permute(2, 0, 1)
        a = self.lora_A[adapter_name].weight.unflatten(0, (self.num_experts, r))
        return b, a, self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`scaling · B A` of every expert, in the parameter's shape."""
        b, a, scaling = self.get_delta_factors(adapter_name)
        dtype = b.dtype
        if dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()
        return ((b @ a) * scaling).to(dtype).reshape(self.get_param().shape)

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names is not possible with target_parameters: the rows of a batch share the parameter "
                f"{self.parameter_name}. Run one batch an adapter."
            )
        self._adapter_kwargs(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        with self._activate_lora(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped module, freed of this wrapper and of those within, with their adapters merged if asked for."""
        inner = self.base_layer
        if isinstance(inner, ParamWrapper):
            inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.get_base_layer()

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition("(")
        return f"{head}(\n  parameter_name={self.parameter_name!r}{rest}"
