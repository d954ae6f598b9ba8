# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on layers that multiply by a matrix: `nn.Linear`, transformers' `Conv1D` and their quantised forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Module

from peft import dora
from peft.dora.mixed import Group, linear_of_groups
from peft.dora.products import autocast_dtype
from peft.engine.layer import BaseTunerLayer
from peft.engine.machine import index_of, sorted_by_adapter
from peft.utils.other import transpose
from peft.weights import BaseWeight, find_weight
from peft.weights.through import straight_through

from ..inits import STARTS
from ..variants.alora import ALoraDoraLinearVariant, ALoraLinearVariant
from ..variants.arrow import ArrowLinearVariant
from ..variants.bdlora import BdLoraLinearVariant, as_matrix
from ..variants.dora import DoraLinearVariant
from ..variants.kasa import KasaLinearVariant
from ..variants.mica import MiCALinearVariant
from ..variants.monteclora import MontecloraLinearVariant
from ..variants.velora import VeloraLinearVariant
from .base import LoraLayer
from .parallel import Split, split_of

if TYPE_CHECKING:
    from ..config import LoraConfig
    from .variant import LoraVariant


@dataclass
class FusedPlan:
    """All that a fused forward pass needs and that stays the same until the adapters change.

    Args:
        name: The one active adapter.
        weight: The base weight.
        lora_a, lora_b: The modules that hold A and B, to notice when somebody replaces them.
        magnitude: The module that holds the magnitude; None for plain LoRA.
        dropout: The adapter's dropout; None where it is none.
        cache: Where norm and cast factors are kept; None where nothing is.
        route: Which body runs.
        hooks: The dictionaries that hooks on the modules would be in.
        modules: Those modules, on which somebody might set another forward.
    """

    name: str
    weight: BaseWeight
    lora_a: nn.Linear
    lora_b: nn.Linear
    magnitude: nn.Module | None
    dropout: nn.Module | None
    cache: dora.NormCache | None
    route: dora.Route
    hooks: tuple[dict, ...]
    modules: tuple[nn.Module, ...]

    def is_in_place(self, layer: LoraLinearBase) -> bool:
        """Whether the modules are those of the plan, and calling them does no more than their class's forward."""
        base, a, b, *_ = self.modules
        own = layer._modules
        return (
            own["lora_A"]._modules.get(self.name) is a
            and own["lora_B"]._modules.get(self.name) is b
            and own["base_layer"] is base
            and own["lora_magnitude_vector"]._modules.get(self.name) is self.magnitude
            and not any(self.hooks)
            and "forward" not in a.__dict__
            and "forward" not in b.__dict__
            and "forward" not in base.__dict__
        )


class LoraLinearBase(LoraLayer, nn.Module):
    """What `lora.Linear` and its quantised siblings share.

    With one active adapter, no hooks in the way and a weight that can be read, the base product, the branch, the gain
    and the bias are one autograd Function (`peft.dora.linear`); otherwise the base layer runs as it is and the
    adapters go on top of its output.

    Args:
        base_layer: The layer to adapt.
        adapter_name: Name of the first adapter.
        config: Its settings.
        r: Its rank.
        lora_alpha: Numerator of its scaling.
        is_target_conv_1d_layer: Whether the base layer is transformers' `Conv1D`, which stores its weight transposed.
    """

    def __init__(
        self,
        base_layer: Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = self._stored_transposed(config)
        self.weight_axis = 1 if self.fan_in_fan_out else 0
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    known_starts = STARTS

    def _stored_transposed(self, config: LoraConfig) -> bool:
        return config.fan_in_fan_out

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {
            (): None,
            ("use_dora",): DoraLinearVariant,
            ("mica",): MiCALinearVariant,
            ("kasa_config",): KasaLinearVariant,
            ("use_bdlora",): BdLoraLinearVariant,
            ("velora_config",): VeloraLinearVariant,
            ("monteclora_config",): MontecloraLinearVariant,
            ("arrow_config",): ArrowLinearVariant,
            ("alora_invocation_tokens",): ALoraLinearVariant,
            ("alora_invocation_tokens", "use_dora"): ALoraDoraLinearVariant,
        }

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=lora_bias)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return as_matrix(self.lora_A[name]), as_matrix(self.lora_B[name])

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        return transpose(matrix, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        variant = self.lora_variant.get(adapter_name)
        return variant is None or variant.supports_lora_conversion()

    def split(self, x: torch.Tensor, y: torch.Tensor) -> Split | None:
        return split_of(self, x, y)

    def call_base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of every layer; where the base layer's own forward pass records no gradient, one with it."""
        if torch.is_grad_enabled():
            if "_closed" not in self.__dict__:
                self._look_at_base()
            if self.__dict__["_closed"] is not None:
                return straight_through(self.base_layer, self.__dict__["_closed"], x)
        return self.base_layer(x, *args, **kwargs)

    def _look_at_base(self) -> None:
        """Note the base weight where the base layer's own forward pass records no gradient, else None."""
        inner = isinstance(self.base_layer, BaseTunerLayer)
        weight = None if inner else _readable(self.base_layer, self.fan_in_fan_out)
        self.__dict__["_closed"] = None if weight is None or weight.differentiable else weight

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        weight = find_weight(self.base_layer, fan_in_fan_out=self.fan_in_fan_out)
        if not weight.direct() or weight.compute_dtype not in (None, x.dtype):
            return super().base_product(x)
        return nn.functional.linear(x, weight.dense(x.dtype))  # no bias to take away again, so nothing rounds twice

    # ---- the fused path --------------------------------------------------------------------------------------------
    def _plan_run(self) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        self._look_at_base()
        run = super()._plan_run()
        if run is not LoraLinearBase._forward_general:
            return run
        self.__dict__["_fused"] = self._plan_fused()
        return run if self.__dict__["_fused"] is None else LoraLinearBase._forward_fused

    def _plan_fused(self) -> FusedPlan | None:
        """The plan for one active adapter whose arithmetic is all known; None where the modules must be called."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if self.has_adapter(name)]
        return self._plan_adapter(names[0]) if len(names) == 1 else None

    def _plan_adapter(self, name: str) -> FusedPlan | None:
        """The plan for one adapter of this layer, active or not; None where the modules must be called."""
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        variant = self.lora_variant.get(name)
        plain_factors = type(lora_a) is nn.Linear and type(lora_b) is nn.Linear
        if not plain_factors or type(variant) not in (type(None), DoraLinearVariant, MiCALinearVariant):
            return None
        weight = _readable(self.base_layer, self.fan_in_fan_out)
        if weight is None or not weight.direct() or weight.layer is not self.base_layer or weight.trainable:
            return None
        route = self.dora_route(name)
        # Plain LoRA has no norm to keep; the kernels cast its factors where those of the whole model are.
        cache = self.norm_cache(name) if route.path == "triton" or type(variant) is DoraLinearVariant else None
        magnitude = self.lora_magnitude_vector[name] if name in self.lora_magnitude_vector else None
        dropout = None if type(self.lora_dropout[name]) is nn.Identity else self.lora_dropout[name]
        modules = tuple(filter(None, (self.base_layer, lora_a, lora_b, magnitude)))
        hooks = tuple(
            hooks
            for module in modules
            for hooks in (
                module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
            )
        )  # fmt: skip
        return FusedPlan(name, weight, lora_a, lora_b, magnitude, dropout, cache, route, hooks, modules)

    def _forward_fused(self, x: torch.Tensor) -> torch.Tensor:
        plan: FusedPlan = self.__dict__["_fused"]
        if type(x) is not torch.Tensor or not plan.is_in_place(self):
            return self._forward_general(x)
        compute_dtype = plan.weight.compute_dtype
        if compute_dtype is not None and compute_dtype is not x.dtype:
            return self._forward_general(x)
        a = plan.lora_a._parameters["weight"]
        dropout = plan.dropout
        if dropout is not None and dropout.training and dropout.p > 0.0:
            if plan.magnitude is None or not (x.dtype == a.dtype or autocast_dtype(x.device.type)):
                return self._forward_general(x)  # plain LoRA, or a wider adapter, whose dropout acts in its own dtype
            return self._forward_dropped(plan, x, dropout)
        b = plan.lora_b._parameters
        return dora.linear(
            x,
            plan.weight,
            a,
            b["weight"],
            scaling=self.scaling[plan.name],
            magnitude=None if plan.magnitude is None else plan.magnitude._parameters["weight"],
            lora_bias=b["bias"],
            cache=plan.cache,
            route=plan.route,
        )

    # ---- several adapters in one batch -----------------------------------------------------------------------------
    def _replan(self) -> None:
        super()._replan()
        self.__dict__["_plans"] = {}

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """As of every layer; without gradient the base product and all branches are a few launches."""
        if not (args or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            rows, order, back = sorted_by_adapter(tuple(adapter_names))
            weight, groups = self._groups_of_batch(x, rows)
            if weight is not None:
                if order is None:
                    return linear_of_groups(x, weight, groups)
                y = linear_of_groups(x.index_select(0, index_of(order, x.device)), weight, groups)
                return y.index_select(0, index_of(back, x.device))
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _groups_of_batch(self, x: torch.Tensor, rows: dict[str, slice]) -> tuple[BaseWeight | None, list[Group]]:
        """The base weight, and what each adapter does on its rows; None for a weight where modules must be called."""
        plans: dict[str, FusedPlan | None] = self.__dict__["_plans"]
        groups, weight = [], None
        for name, part in rows.items():
            if not self.has_adapter(name):
                groups.append(Group(part))
                continue
            if name not in plans:
                plans[name] = self._plan_adapter(name)
            plan = plans[name]
            if plan is None or not plan.is_in_place(self) or plan.weight.compute_dtype not in (None, x.dtype):
                return None, []
            if plan.dropout is not None and plan.dropout.training and plan.dropout.p > 0.0:
                return None, []
            a, b = plan.lora_a.weight, plan.lora_b
            magnitude = None if plan.magnitude is None else plan.magnitude.weight
            groups.append(Group(part, a, b.weight, self.scaling[name], magnitude, b.bias, plan.cache, plan.route))
            weight = plan.weight
        return (weight if type(x) is torch.Tensor else None), groups

    def _forward_dropped(self, plan: FusedPlan, x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
        """DoRA while dropout d is active: W x + b + (g − 1)∘W d(x) + g∘s·B A d(x)."""
        y = self.base_layer(x)
        a, b, scaling = plan.lora_a.weight, plan.lora_b.weight, self.scaling[plan.name]
        added = dora.branch(
            dropout(x),
            plan.weight,
            a,
            b,
            scaling=scaling,
            magnitude=self.lora_magnitude_vector[plan.name].weight,
            norm=plan.cache.get(plan.weight, a, b, scaling, plan.route),
            lora_bias=plan.lora_b.bias,
            route=plan.route,
        )
        return y + added.to(y.dtype)


def _readable(base_layer: nn.Module, fan_in_fan_out: bool) -> BaseWeight | None:
    """The weight of a base layer; None where it is in no known format, so that only the layer itself can compute."""
    try:
        return find_weight(base_layer, fan_in_fan_out=fan_in_fan_out)
    except TypeError:
        return None


class Linear(LoraLinearBase):
    """LoRA on `nn.Linear` and transformers' `Conv1D`."""
