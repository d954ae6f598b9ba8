# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The model side of every tuner: it injects adapters into a base model and switches, merges and removes them."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module
from tqdm import tqdm

from peft.config import PeftConfig
from peft.utils.constants import DUMMY_MODEL_CONFIG
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules, set_additional_trainable_modules
from peft.utils.seams import public
from peft.utils.warning import PeftWarning

from . import tying
from .activate import delete_adapter, set_adapter, set_requires_grad
from .biases import trained_biases
from .devices import onload_layer
from .inject import inject
from .layer import BaseTunerLayer
from .mixed_batch import adapter_names_hooks, copies_in_generation
from .targets import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists

StateDict = dict[str, torch.Tensor]
Names = list[str] | None  # of adapters; None for the active ones
FACADE = "peft.tuners.tuners_utils"  # where other packages look for, and replace, the engine's functions


class BaseTuner(Module, ABC):
    """Wraps a base model and keeps adapters in its layers.

    A subclass names its parameters' `prefix`, its layers' class `tuner_layer_cls` and its default targets
    `target_module_mapping`, and creates or updates one layer in `_create_and_replace`.

    Args:
        model: Base model; it is changed in place.
        peft_config: One config, or a dict of configs by adapter name.
        adapter_name: Name of the adapter to create.
        low_cpu_mem_usage: Create the adapter's parameters on the meta device, to be filled by loading.
        state_dict: A saved adapter; if given, the modules it has parameters for are adapted, whatever the config says.

    Raises:
        ValueError: The config does not say which modules to adapt, or names a module that cannot be adapted.
        NoMatchingPeftModuleError: The config names no module of this model.
    """

    prefix: str
    tuner_layer_cls: type[BaseTunerLayer] = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state: bool = False
    supports_weight_tying: bool = False

    def __init__(
        self,
        model: Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: StateDict | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        configs = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        existing = getattr(model, "peft_config", None)
        if isinstance(existing, dict) and existing is not configs:
            warnings.warn(
                "The base model has a peft_config already, so it will carry several adapters. Call unload() first if "
                "the earlier ones were to be replaced.",
                PeftWarning,
                stacklevel=3,
            )
            configs = {**existing, **configs}
        self.peft_config = configs
        self.active_adapter: str | list[str] = adapter_name
        config = self.peft_config[adapter_name]
        self._pre_injection_hook(self.model, config, adapter_name)
        self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        self._post_injection_hook(self.model, config, adapter_name)
        self.model.peft_config = self.peft_config

    # ---- what a subclass may answer ------------------------------------------------------------------------------
    @abstractmethod
    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Add the adapter to `target`, which is already a layer of this tuner, or replace it in `parent` by one."""

    def _pre_injection_hook(self, model: Module, config: PeftConfig, adapter_name: str) -> None:
        """Runs before an adapter is injected; nothing by default."""

    def _post_injection_hook(self, model: Module, config: PeftConfig, adapter_name: str) -> None:
        """Runs after an adapter was injected; nothing by default."""

    def _prepare_model(self, peft_config: PeftConfig, model: Module) -> None:
        """Changes the base model before injection, such as replicating layers; nothing by default."""

    def _inject_parameters(
        self, peft_config: PeftConfig, model: Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapts bare parameters (`target_parameters`) and returns their names; none by default."""
        return []

    def _parameter_owners(self, peft_config: PeftConfig, model: Module) -> set[str]:
        """Names of the modules whose bare parameters the config targets; none by default."""
        return set()

    def _tied_to(self, peft_config: PeftConfig, model: Module, names: list[str]) -> list[str]:
        """Further modules to adapt, since they share a weight with one of `names`; none by default."""
        return []

    def _trained_whole(self, peft_config: PeftConfig, model: Module) -> list[str]:
        """Modules that are not to be adapted, since they are trained whole though nothing names them; none by default."""
        return []

    def _tie_adapters(self, peft_config: PeftConfig, model: Module, adapter_name: str) -> None:
        """Makes new adapters of layers that share a weight share theirs; nothing by default."""

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Refuse a config that does not go with the adapters that are there."""
        with_bias = [name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if len(with_bias) > 1:
            raise ValueError(
                f"{type(self).__name__} can hold one adapter that trains biases, since all adapters share the base "
                f"model's: {', '.join(map(repr, with_bias))} would; set bias='none' for all but one."
            )

    def _check_merge_allowed(self) -> None:
        """Say what is known to go wrong before adapters are merged."""
        tying.warn_about_merging_tied(
            tying.tied_targets(self.targeted_module_names, self.get_model_config(self.model))
        )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Fill in the default targets of the model's type where the config names none; beside `target_parameters` there
        need not be any."""
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in self.target_module_mapping:
                if getattr(peft_config, "target_parameters", None):
                    return peft_config
                raise ValueError(
                    f"target_modules is not set and there is no default for the model type {model_type!r}: set "
                    "target_modules to names of modules, or to 'all-linear'."
                )
            default = self.target_module_mapping[model_type]
            peft_config.target_modules = default if isinstance(default, str) else set(default)
        return peft_config

    @staticmethod
    def _check_target_module_exists(
        peft_config: PeftConfig, key: str
    ) -> bool | re.Match[str] | None | _ExcludedModule:
        return check_target_module_exists(peft_config, key)

    @staticmethod
    def get_model_config(model: Module) -> dict:
        """The base model's config as a dict; a stand-in for models that have none."""
        config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dict(config) if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))

    # ---- injection -----------------------------------------------------------------------------------------------
    def inject_adapter(
        self,
        model: Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: StateDict | None = None,
    ) -> None:
        """Create the adapter `adapter_name` of `self.peft_config` in the model's layers.

        Args:
            model: The base model.
            adapter_name: Its name.
            autocast_adapter_dtype: Taken for compatibility; it is the model around a tuner that casts new adapters,
                so that injected ones keep the base weight's dtype.
            low_cpu_mem_usage: As in the constructor.
            state_dict: Likewise.
        """
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        model_config = self.get_model_config(model)
        config = self._prepare_adapter_config(config, model_config)
        self._prepare_model(config, model)
        config = _maybe_include_all_linear_layers(config, model)
        self.peft_config[adapter_name] = config
        self.targeted_module_names = inject(self, model, config, adapter_name, low_cpu_mem_usage, state_dict)
        self.targeted_parameter_names = self._inject_parameters(config, model, adapter_name, low_cpu_mem_usage)
        self._tie_adapters(config, model, adapter_name)
        tying.warn_about_tied_targets(
            tying.tied_targets(self.targeted_module_names, model_config),
            getattr(config, "ensure_weight_tying", False),
            self.supports_weight_tying,
        )
        self._mark_only_adapters_as_trainable(model)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if config.inference_mode:
            self.set_requires_grad(adapter_name, requires_grad=False)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=model_config,
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        public(FACADE, "cast_adapter_dtype")(self.model, adapter_name, autocast_adapter_dtype)

    def _mark_only_adapters_as_trainable(self, model: Module) -> None:
        """Freeze everything but adapters, then thaw the biases that an active adapter's config asks for."""
        for name, parameter in model.named_parameters():
            if self.prefix not in name:
                parameter.requires_grad_(False)
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            parameters = dict(model.named_parameters())
            for name in trained_biases(model, parameters, bias, adapter, self.prefix):
                parameters[name].requires_grad_(True)

    def _layers(self) -> Iterator[BaseTunerLayer]:
        return (module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls))

    # ---- activation ----------------------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        active = self.active_adapter
        return [active] if isinstance(active, str) else active

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones, trainable unless `inference_mode`."""
        set_adapter(self.model, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or thaw adapters without changing which are active."""
        set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again after `disable_adapter_layers`."""
        self._set_adapter_layers(enabled=True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, so that the model computes what the base model does."""
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Adapter {adapter!r} trains biases (bias={bias!r}), which stay changed while adapters are off: "
                    "the output is not exactly the base model's.",
                    PeftWarning,
                    stacklevel=2,
                )
        self._set_adapter_layers(enabled=False)

    def _set_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, another becomes active.

        Raises:
            ValueError: There is no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}; present: {', '.join(self.peft_config)}.")
        new_active = delete_adapter(self.model, adapter_name, self.prefix, layer_cls=self.tuner_layer_cls)
        del self.peft_config[adapter_name]
        self.active_adapter = new_active or []

    # ---- merging -------------------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: Names = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights and keep them, so that `unmerge_adapter` can undo it.

        Args:
            adapter_names: Adapters to fold in; None for the active ones.
            safe_merge: Check every new weight for NaN and infinity first.
        """
        self._check_merge_allowed()
        layers = self._merging_order(adapter_names)
        tying.part(layers, self.active_adapters if adapter_names is None else adapter_names)
        for module in layers:
            with onload_layer(module):
                module.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                with onload_layer(module):
                    module.unmerge()
        tying.rejoin(self.model, unmerged=True)

    def _merging_order(self, adapter_names: list[str] | None) -> list[BaseTunerLayer]:
        """The layers to merge, after making sure that none of them will refuse half-way."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            if hasattr(layer, "check_mergeable"):
                layer.check_mergeable(layer.active_adapters if adapter_names is None else adapter_names)
        return layers

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Names = None
    ) -> Module:
        """Fold adapters into the base weights and return the plain base model.

        Args:
            progressbar: Show progress by module.
            safe_merge: Check every new weight for NaN and infinity first.
            adapter_names: Adapters to fold in; None for the active ones.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def unload(self) -> Module:
        """Return the base model without its adapters, merging nothing."""
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Names = None,
    ) -> Module:  # fmt: skip
        if merge:
            self._check_merge_allowed()
            layers = self._merging_order(adapter_names)
            tying.part(layers, self.active_adapters if adapter_names is None else adapter_names)
        elif any(layer.merged for layer in self._layers()):
            warnings.warn(
                "unload() takes the merged adapters out of the base weights again; merge_and_unload() leaves them in.",
                PeftWarning,
                stacklevel=3,
            )
        wrapped = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        names = [name for name, module in self.model.named_modules() if isinstance(module, wrapped)]
        outermost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
        for name in tqdm(outermost, disable=not progressbar, desc="Merging" if merge else "Unloading"):
            parent, target, target_name = _get_submodules(self.model, name)
            with onload_layer(target):
                if hasattr(target, "unload_and_optionally_merge_module"):
                    plain = target.unload_and_optionally_merge_module(
                        merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                    )
                else:
                    plain = self._unwrapped(target, merge, safe_merge, adapter_names)
                self._replace_module(parent, target_name, plain, target)
        tying.rejoin(self.model, unmerged=not merge)
        if merge:
            tying.note_untied(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @staticmethod
    def _unwrapped(layer: BaseTunerLayer, merge: bool, safe_merge: bool, names: list[str] | None) -> Module:
        """The base layer of a possibly nested adapted layer, inner adapters merged before outer ones."""
        nested = [layer]
        while isinstance(getattr(nested[-1], "base_layer", None), BaseTunerLayer):
            nested.append(nested[-1].base_layer)
        for inner in reversed(nested):
            if merge:
                inner.merge(safe_merge=safe_merge, adapter_names=names)
            elif inner.merged:
                inner.unmerge()
        return layer.get_base_layer()

    def _replace_module(self, parent: Module, child_name: str, new_module: Module, child: Module) -> None:
        """Put a module into another's place; its adapters were created on the right device already."""
        setattr(parent, child_name, new_module)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's update by this adapter can be written as LoRA."""
        layers = list(self._layers())
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a call to the layers, for as long as the call runs."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names needs the model in inference mode: call model.eval() first.")
        with adapter_names_hooks(self.model, adapter_names, copies_in_generation(kwargs)):
            yield

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet: asking the model for its own name would not end
                raise
            return getattr(self.model, name)

    # ---- saved adapters ------------------------------------------------------------------------------------------
    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: StateDict,
        unwanted_adapter_names: list[str],
    ) -> StateDict:
        """The entries of a state dict that belong to one adapter, keys as they are in memory."""
        return {key: value for key, value in state_dict.items() if _slot_position(key, cls.prefix, adapter_name)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A key as it is saved: without the adapter's name."""
        position = _slot_position(key, cls.prefix, adapter_name)
        if not position:
            return key
        parts = key.split(".")
        return ".".join(parts[:position] + parts[position + 1 :])

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Module, config: PeftConfig, adapter_name: str, state_dict: StateDict
    ) -> StateDict:
        """A saved adapter with the adapter's name put into its keys."""
        return {cls._insert_adapter_name(key, adapter_name): value for key, value in state_dict.items()}

    @classmethod
    def _insert_adapter_name(cls, key: str, adapter_name: str) -> str:
        parts = key.split(".")
        slots = [i for i, part in enumerate(parts) if part.startswith(cls.prefix)]
        if not slots:
            return key
        return ".".join([*parts[: slots[-1] + 1], adapter_name, *parts[slots[-1] + 1 :]])


def _slot_position(key: str, prefix: str, adapter_name: str) -> int:
    """Where in a dotted key the adapter's name stands, right after a part with the prefix; 0 where it does not."""
    parts = key.split(".")
    for i in range(1, len(parts)):
        if parts[i] == adapter_name and parts[i - 1].startswith(prefix):
            return i
    return 0
