# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`PeftMixedModel`: a base model whose adapters may be of several methods, and may be active together."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers.utils import PushToHubMixin

from peft.config import PeftConfig
from peft.peft_model import loading, saving
from peft.peft_model.adapters import HoldsAdapters, added_adapter, check_adapter_name
from peft.peft_model.offload import place_adapter
from peft.tuners.mixed import MixedModel
from peft.utils.constants import DUMMY_MODEL_CONFIG


class PeftMixedModel(PushToHubMixin, HoldsAdapters):
    """A base model with adapters of several methods; any number of them is active at a time.

    Attributes that are not found here are looked for in the tuner `base_model`, and then in the base model.

    Args:
        model: Base model; its layers are wrapped in place.
        peft_config: Config of the first adapter.
        adapter_name: Name of the first adapter.

    Attributes:
        base_model: The `MixedModel`.
        config: The base model's config.
        modules_to_save: Names of the modules that are trained in full and saved with an adapter, None if none.

    Raises:
        ValueError: The method does not go together with others, or the config does not go with the model.

    Example:
        >>> from torch import nn
        >>> from peft import LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]), mixed=True)
        >>> model.add_adapter("other", LoraConfig(r=4, target_modules=["0"]))
        >>> model.set_adapter(["default", "other"])
        >>> model.active_adapters
        ['default', 'other']
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        self.modules_to_save: set[str] | None = None
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name)
        self.config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        try:
            self._finish_adapter(adapter_name, peft_config)
        except Exception:
            self.base_model.unload()
            raise

    def _finish_adapter(
        self, adapter_name: str, config: PeftConfig, autocast_adapter_dtype: bool = True, on_meta: bool = False
    ) -> None:
        self.set_modules_to_save(config, adapter_name)
        if not on_meta:
            place_adapter(self.base_model, adapter_name)
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    def get_base_model(self) -> nn.Module:
        """The base model, its layers still wrapped."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass with the active adapters."""
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters."""
        return self.base_model.generate(*args, **kwargs)

    # ---- adapters --------------------------------------------------------------------------------------------------
    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype:
        bool = True,
    ) -> None:  # fmt: skip
        """Create a further adapter, of any method that goes together with others; it is not activated.

        Args:
            adapter_name: Name of the adapter, without dots.
            peft_config: Its config.
            low_cpu_mem_usage: Create its parameters on the meta device, to be filled by loading.
            autocast_adapter_dtype: Keep it in float32 where the base model is in float16 or bfloat16.

        Raises:
            ValueError: The name is taken or holds a dot, or the method does not go together with others.
        """
        with added_adapter(self.base_model, adapter_name, peft_config):
            self.base_model.inject_adapter(
                self.base_model.model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            self._finish_adapter(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Note the modules that a new adapter trains in full.

        Args:
            peft_config: Config of the adapter.
            adapter_name: Name of the adapter.
        """
        names = getattr(peft_config, "modules_to_save", None)
        if names:
            self.modules_to_save = (self.modules_to_save or set()) | set(names)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only ones to be trained.

        Args:
            adapter_name: One name or several.
            inference_mode: Activate them without making them trainable.

        Raises:
            ValueError: There is no such adapter.
        """
        self._check_adapters_exist(adapter_name)
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters; if no other was active, one that stays becomes active.

        Args:
            adapter_name: One name or several.

        Raises:
            ValueError: There is no such adapter, or it is merged.
        """
        for name in self._check_adapters_exist(adapter_name):
            self.base_model.delete_adapter(name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Fold adapters into the base weights and return the plain base model. Arguments as in the tuners."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the base model without its adapters, merging nothing."""
        return self.base_model.unload(*args, **kwargs)

    def _status_of(self) -> nn.Module:
        return self.base_model

    # ---- files -----------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = False,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters, as `PeftModel.save_pretrained` does.

        Args:
            save_directory: Folder, made if it is not there.
            safe_serialization: Write `adapter_model.safetensors`; False writes `adapter_model.bin`.
            selected_adapters: Adapters to save; None for all.
            **kwargs: `save_embedding_layers`, `is_main_process` and `state_dict`, as in `PeftModel.save_pretrained`.

        Raises:
            ValueError: `save_directory` is a file, or a selected adapter is not there.
        """
        saving.save_adapters(
            self,
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=kwargs.pop("save_embedding_layers", "auto"),
            is_main_process=kwargs.pop("is_main_process", True),
            initial_adapter=None,
            kwargs=kwargs,
        )

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | os.PathLike, adapter_name: str = "default", is_trainable: bool =
        False, config: PeftConfig | None = None, **kwargs: Any,
    ) -> PeftMixedModel:  # fmt: skip
        """Put a saved adapter on a base model. Others can be added to it with `load_adapter`.

        Args:
            model: Base model, changed in place; as it was if loading fails.
            model_id: Folder, or name of a repository on the Hub.
            adapter_name: Name to give the adapter.
            is_trainable: Load it for further training.
            config: Config to use instead of the saved one.
            **kwargs: As in `PeftModel.from_pretrained`.

        Raises:
            ValueError: No adapter is found, or it does not fit the model.
        """
        if config is None:
            config = loading.load_config(model_id, is_trainable, False, kwargs)
        else:
            config = loading.prepare_config(config, is_trainable, False)
        weights = loading.read_weights(
            model, model_id, kwargs.get("torch_device"), kwargs.pop("key_mapping", None), kwargs
        )
        mixed = cls(model, config, adapter_name)
        try:
            loading.fill(mixed, adapter_name, weights, model_id, kwargs=kwargs)
        except Exception:
            mixed.unload()
            raise
        if not is_trainable:
            mixed.eval()
        return mixed

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter as a further one, or into an existing one of that name.

        Args:
            model_id: Folder, or name of a repository on the Hub.
            adapter_name: Name to give the adapter.
            *args, **kwargs: As in `PeftModel.load_adapter`.

        Returns:
            An object with `missing_keys` and `unexpected_keys`.

        Raises:
            ValueError: No adapter is found, or it does not fit the model.
        """
        return loading.load_adapter(self, model_id, adapter_name, *args, **kwargs)
