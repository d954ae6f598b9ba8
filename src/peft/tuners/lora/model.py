# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The LoRA tuner: which layer goes around which module, and how its parameters are called in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn import Module

from peft import dora
from peft.engine.layer import BaseTunerLayer
from peft.engine.machine import plan_compiled
from peft.engine.replicate import replicate_layers
from peft.engine.targets import is_transformers_model
from peft.engine.tuner import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils.seams import public

from . import aqlm, awq, bnb, eetq, gptq, hqq, inc, layer, te, tied, torchao, tp_layer, weighted
from .config import LoraConfig
from .parameters import find_parameters, in_todays_layout, inject_parameters
from .split_factors import add_lora_tp_hooks_dtensor, get_tp_plan_and_mesh
from .variants.alora import alora_offsets_hooks, get_alora_offsets_for_forward, get_alora_offsets_for_generate
from .variants.kasa import kasa_loss

_CONVERSIONS = "transformers.conversion_mapping"  # since transformers 5, which stacks experts
_MAGNITUDE = "lora_magnitude_vector"


class LoraModel(BaseTuner):
    """Keeps LoRA adapters (Hu et al., arXiv 2106.09685), DoRA among them, in the layers of a base model.

    Args:
        model: Base model, changed in place.
        peft_config: A `LoraConfig`, or a dict of them by adapter name.
        adapter_name: Name of the adapter to create.
        low_cpu_mem_usage: Create its parameters on the meta device, to be filled by loading.
        state_dict: A saved adapter whose modules are to be adapted.

    Raises:
        ValueError: The config asks for something that a layer or this package cannot do.

    Example:
        >>> from torch import nn
        >>> from peft import LoraConfig, LoraModel
        >>> tuned = LoraModel(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]), "default")
        >>> tuned.targeted_module_names
        ['0']
    """

    prefix = "lora_"
    supports_weight_tying = True
    tuner_layer_cls = layer.LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        dora.watch_passes(self.model)
        if plan_compiled not in self.model._forward_pre_hooks.values():
            self.model.register_forward_pre_hook(plan_compiled)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dora.begin_pass(self.model)
        try:
            return super().forward(*args, **kwargs)
        finally:
            dora.end_pass(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        dora.unwatch_passes(model)
        hooks = model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is plan_compiled]:
            del hooks[key]
        return model

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: dict) -> LoraConfig:
        """As of every tuner; names of single experts become the stacked parameters that transformers makes of them."""
        if is_transformers_model(self.model) and find_spec(_CONVERSIONS) is not None:
            conversions = public(_CONVERSIONS, "get_model_conversion_mapping")(self.model)
            convert = public("peft.utils.transformers_weight_conversion", "convert_peft_config_for_transformers")
            convert(peft_config, self.model, conversions)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        config.check_values()

    def _prepare_model(self, peft_config: LoraConfig, model: Module) -> None:
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    def _inject_parameters(
        self, peft_config: LoraConfig, model: Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        return inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage)

    def _parameter_owners(self, peft_config: LoraConfig, model: Module) -> set[str]:
        return {path for path, _, _ in find_parameters(peft_config, model)}

    def _tied_to(self, peft_config: LoraConfig, model: Module, names: list[str]) -> list[str]:
        return tied.partners(model, peft_config, self.get_model_config(model), names)

    def _trained_whole(self, peft_config: LoraConfig, model: Module) -> list[str]:
        return tied.trained_whole(model, peft_config, self.get_model_config(model))

    def _tie_adapters(self, peft_config: LoraConfig, model: Module, adapter_name: str) -> None:
        tied.tie_adapters(model, peft_config, self.get_model_config(model), adapter_name)

    # ---- calls -----------------------------------------------------------------------------------------------------
    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` and `alora_offsets` to the layers, the latter worked out where they are needed."""
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is not None:
            kwargs = get_alora_offsets_for_forward(self, **kwargs)
        else:
            kwargs = get_alora_offsets_for_generate(self, *args, **kwargs)
        offsets = kwargs.pop("alora_offsets", None)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            if offsets is None:
                yield
            else:
                with alora_offsets_hooks(self.model, self._layers(), offsets):
                    yield

    def _get_kasa_loss(self) -> torch.Tensor | float:
        """What KaSA adapters add to the loss; a training loop adds it to the model's."""
        configs = {name: config.kasa_config for name, config in self.peft_config.items()}
        return kasa_loss(self._layers(), {name: config for name, config in configs.items() if config is not None})

    # ---- layers ----------------------------------------------------------------------------------------------------
    def _create_and_replace(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if current_key is None:
            raise ValueError("current_key must be the module's dotted name, got None.")
        pattern_key = tied.leader(self.model, lora_config, self.get_model_config(self.model), current_key)
        rank_key = get_pattern_key(lora_config.rank_pattern.keys(), pattern_key)
        alpha_key = get_pattern_key(lora_config.alpha_pattern.keys(), pattern_key)
        kwargs = {
            "r": lora_config.rank_pattern.get(rank_key, lora_config.r),
            "lora_alpha": lora_config.alpha_pattern.get(alpha_key, lora_config.lora_alpha),
        }
        if isinstance(target, layer.LoraLayer):
            target.update_layer(adapter_name, config=lora_config, **kwargs)
            return
        kwargs |= {
            "loaded_in_8bit": getattr(self.model, "is_loaded_in_8bit", False),
            "loaded_in_4bit": getattr(self.model, "is_loaded_in_4bit", False),
            "ephemeral_gpu_offload": lora_config.runtime_config.ephemeral_gpu_offload,
            "target_name": current_key,
            "parameter_name": parameter_name,
            **get_quantization_kwargs(self.model),
        }
        new_module = self._create_new_module(lora_config, adapter_name, target, **kwargs)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an added adapter is not trained before it is activated
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: Module, **kwargs: Any) -> Module:
        """The LoRA layer for a module.

        Raises:
            ValueError: No LoRA layer goes around this kind of module.
        """
        # looked up in their modules at each call: other packages replace them there
        dispatchers = [
            bnb.dispatch_bnb_8bit,
            bnb.dispatch_bnb_4bit,
            tp_layer.dispatch_megatron,
            hqq.dispatch_hqq,
            awq.dispatch_awq,
            gptq.dispatch_gptq,
            aqlm.dispatch_aqlm,
            eetq.dispatch_eetq,
            inc.dispatch_inc,
            te.dispatch_transformer_engine,
            torchao.dispatch_torchao,
            layer.dispatch_default,
        ]
        if lora_config._custom_modules:
            dispatchers.insert(0, _dispatch_custom)
        for dispatch in dispatchers:
            new_module = dispatch(target, adapter_name, config=lora_config, **kwargs)
            if new_module is not None:
                return new_module
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        raise ValueError(
            f"{kwargs.get('target_name', 'The target')} is a {type(base).__name__}, which LoRA cannot adapt. It adapts "
            "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, transformers' Conv1D "
            "and the linear layers of the storage formats in peft.weights.FORMATS: name such modules in target_modules."
        )

    # ---- new adapters from others ----------------------------------------------------------------------------------
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: Literal["gesvd", "gesvdj", "gesvda"] | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Create an adapter that combines others; it is neither active nor trained until it is activated.

        Magnitudes of DoRA adapters are combined as what they add to the base weight's norm, by the weights, whatever
        the type: m = ‖W‖ + Σ wᵢ (mᵢ − ‖W‖), where a plain adapter counts with mᵢ = ‖W + s·BA‖.

        Args:
            adapters: Names of the adapters to combine, plain LoRA or DoRA.
            weights: One weight for each, negative ones allowed.
            adapter_name: Name of the new adapter. If there is one of that name, a warning says so and nothing changes.
            combination_type: "linear" adds up A and B, each by the root of its weight, exact for one adapter; "cat"
                puts the ranks side by side, exact; "svd" adds up the products BA and cuts them to a rank. "ties"
                (arXiv 2306.01708), "dare_linear", "dare_ties" (arXiv 2311.03099) and "magnitude_prune" prune A and B
                before they add them up; with "_svd" after the name they prune the products.
            svd_rank: Rank to cut to; None for the adapters' largest.
            svd_clamp: Quantile in (0, 1] to which the entries of the cut factors are clamped.
            svd_full_matrices: Passed to `torch.linalg.svd`.
            svd_driver: Likewise; for CUDA tensors.
            density: Share of entries to keep, in [0, 1], where the type prunes.
            majority_sign_method: How TIES elects a sign: "total" by magnitude, "frequency" by number.

        Raises:
            ValueError: An adapter does not exist or cannot be combined, the ranks do not fit the type, or an argument
                is unknown or missing.
        """
        recipe = weighted.make_recipe(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        weighted.add_weighted_adapter(self, adapters, weights, adapter_name, recipe)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Turn an adapter whose start changed the base weight into one for the unchanged weight, of twice the rank.

        Args:
            output_state_dict: The trained adapter, as `get_peft_model_state_dict` gives it.
            adapter_name: The adapter, in this model, that holds the values it started from.
            kwargs: May hold `state_dict`, the state to take that adapter from.

        Raises:
            ValueError: The two adapters do not have the same factors.
        """
        state = (kwargs or {}).get("state_dict")
        initial = get_peft_model_state_dict(self, state_dict=state, adapter_name=adapter_name)
        return weighted.subtract_initial(output_state_dict, initial)

    # ---- files -----------------------------------------------------------------------------------------------------
    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Module, config: LoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = in_todays_layout(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key

    @classmethod
    def _insert_adapter_name(cls, key: str, adapter_name: str) -> str:
        key = re.sub(rf"{_MAGNITUDE}\.weight$", _MAGNITUDE, key)
        key = super()._insert_adapter_name(key, adapter_name)
        return f"{key}.weight" if key.endswith(f"{_MAGNITUDE}.{adapter_name}") else key


def _dispatch_custom(target: Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> Module | None:
    """A layer class that the user registered in the config for this class of module."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for module_class, layer_class in config._custom_modules.items():
        if isinstance(base, module_class):
            return layer_class(target, adapter_name, config=config, **kwargs)
    return None


__all__ = ["LoraModel", "add_lora_tp_hooks_dtensor", "get_tp_plan_and_mesh"]
