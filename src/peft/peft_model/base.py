# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`PeftModel`: a base model, its tuner, and the adapters by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from peft.config import PeftConfig
from peft.utils.seams import public

from . import loading, prompts, saving, status
from .adapters import FACADE, HoldsAdapters, added_adapter, check_adapter_name
from .offload import place_adapter


class PeftModel(PushToHubMixin, HoldsAdapters):
    """A base model with named adapters, one of which is active.

    Attributes that are not found here are looked for in the tuner `base_model`, and then in the base model.

    Args:
        model: Base model; its layers are wrapped in place.
        peft_config: Config of the first adapter.
        adapter_name: Name of the first adapter.
        autocast_adapter_dtype: Keep adapters in float32 where the base model is in float16 or bfloat16.
        low_cpu_mem_usage: Create the adapter's parameters on the meta device, to be filled by loading.

    Attributes:
        base_model: The tuner, such as `LoraModel`; the base model itself for prompt learning.
        active_adapter: Name of the active adapter, None if there is none.
        peft_type: Method of the first adapter.
        peft_config: Configs by adapter name; the same dict as the tuner's.
        special_peft_forward_args: Keyword arguments of a call that are for the adapters, not for the base model.

    Raises:
        ValueError: The method is not available, or the config does not go with the model.

    Example:
        >>> from torch import nn
        >>> from peft import LoraConfig, PeftModel
        >>> model = PeftModel(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 32 || all params: 104 || trainable%: 30.7692
    """

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", autocast_adapter_dtype: bool
        = True, low_cpu_mem_usage: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.active_adapter: str | None = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        prompts.refuse_prompt_learning(peft_config)
        check_adapter_name(adapter_name)
        tuner_cls = public(FACADE, "PEFT_TYPE_TO_TUNER_MAPPING").get(peft_config.peft_type)
        if tuner_cls is None:
            raise ValueError(f"peft_type={status.method_name(peft_config)!r} is not available in this version.")
        self.base_model = tuner_cls(
            model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        try:
            self._finish_adapter(adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            self.base_model.unload()
            raise
        if _uses_gradient_checkpointing(model):
            self.prepare_model_for_gradient_checkpointing(model)

    # ---- what is inside --------------------------------------------------------------------------------------------
    @property
    def active_peft_config(self) -> PeftConfig:
        """Config of the active adapter."""
        if self.active_adapter not in self.peft_config:
            raise ValueError("No adapter is active, so there is no active config: add or load an adapter first.")
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained in full and saved with an adapter, over all adapters; None if none."""
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, None if it does not say."""
        return getattr(self.base_model, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter takes part in the forward pass now."""
        return status.has_active_enabled_adapter(self)

    def get_base_model(self) -> nn.Module:
        """The base model, its layers still wrapped; see `unload` and `merge_and_unload` for the plain one."""
        return self.base_model if self._is_prompt_learning else self.base_model.model

    # ---- forward ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What an adapter needs to know of one call, handed to its layers for as long as the call runs."""
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _without_special_args(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass with adapters.

        Args:
            *args, **kwargs: For the base model, except `adapter_names`: one adapter name for each row of the batch,
                "__base__" for none.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_special_args(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with adapters. Arguments as in `forward`."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **self._without_special_args(kwargs))

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Make the embeddings' output require grad: a checkpointed block whose inputs do not gets no gradient.

        Args:
            model: The base model.
        """
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_require_grad_of_output)
        return model

    # ---- adapters --------------------------------------------------------------------------------------------------
    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype:
        bool = True,
    ) -> None:  # fmt: skip
        """Create a further adapter of the same method; it is not activated, unless no other is there.

        Args:
            adapter_name: Name of the adapter, without dots.
            peft_config: Its config.
            low_cpu_mem_usage: Create its parameters on the meta device, to be filled by loading.
            autocast_adapter_dtype: Keep it in float32 where the base model is in float16 or bfloat16.

        Raises:
            ValueError: The name is taken or holds a dot, or the config is of another method or does not go with the
                model. The model is then as it was.
        """
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"Adapter {adapter_name!r} is of peft_type {status.method_name(peft_config)!r}, but this model holds "
                f"{status.method_name(self)!r} adapters: use get_peft_model(..., mixed=True) to combine methods."
            )
        with added_adapter(self.base_model, adapter_name, peft_config):
            self.base_model.inject_adapter(
                self.base_model.model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            self._finish_adapter(adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        if not self.active_adapters:
            self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def _finish_adapter(self, adapter_name: str, autocast_adapter_dtype: bool, on_meta: bool = False) -> None:
        """Put a new adapter on its devices and into its dtype; one on the meta device gets its device by loading."""
        if not on_meta:
            place_adapter(self.base_model, adapter_name)
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, and the only one to be trained.

        Args:
            adapter_name: Name of the adapter. For several at once, use `model.base_model.set_adapter([...])`.
            inference_mode: Activate it without making it trainable.

        Raises:
            TypeError: `adapter_name` is not a string.
            ValueError: There is no such adapter.
        """
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"adapter_name must be one name, got {adapter_name!r}: use model.base_model.set_adapter([...]) to "
                "activate several adapters."
            )
        self._check_adapters_exist([adapter_name])
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or thaw adapters without changing which is active.

        Args:
            adapter_names: One name or several.
            requires_grad: Whether they are to be trained.

        Raises:
            ValueError: There is no such adapter.
        """
        self._check_adapters_exist(adapter_names)
        self.base_model.set_requires_grad(adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, another becomes active.

        Args:
            adapter_name: Name of the adapter.

        Raises:
            ValueError: There is no such adapter, or it is merged.
        """
        self._check_adapters_exist([adapter_name])
        self.base_model.delete_adapter(adapter_name)
        self.active_adapter = next(iter(self.active_adapters), None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter's update of the weights can be written as LoRA.

        Args:
            adapter_name: Name of the adapter.

        Raises:
            ValueError: There is no such adapter.
        """
        self._check_adapters_exist([adapter_name])
        return self.base_model.supports_lora_conversion(adapter_name)

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> NoReturn:
        """The learned prompt of a prompt-learning adapter; a ValueError for adapters that have none."""
        prompts.no_prompt(self, self.active_adapter)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> NoReturn:
        """The prompt that a prompt-learning adapter is saved as; a ValueError for adapters that have none."""
        self._check_adapters_exist([adapter_name])
        prompts.no_prompt(self, adapter_name)

    # ---- files -----------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: the one named default in the folder itself, others in sub-folders of their names.

        Every file is written beside its place and moved there when all are complete, so that an interrupted save
        leaves what was there before.

        Args:
            save_directory: Folder, made if it is not there.
            safe_serialization: Write `adapter_model.safetensors`; False writes `adapter_model.bin`.
            selected_adapters: Adapters to save; None for all.
            save_embedding_layers: Save the embeddings with the adapter; "auto" does so if they are adapted or were
                resized.
            is_main_process: False writes nothing, for all processes but one of a distributed run.
            path_initial_model_for_weight_conversion: Where the adapter was saved before training, if its
                initialisation changed the base weights (PiSSA, OLoRA, …): what is saved then is an ordinary LoRA
                adapter of twice the rank for the original base weights.
            **kwargs: `state_dict`: a state dict gathered elsewhere, to be saved instead of the model's own. Others are
                accepted for callers that also save base models, and have no meaning here.

        Raises:
            ValueError: `save_directory` is a file, a selected adapter is not there, or the conversion is not possible.
        """
        saving.save_adapters(
            self,
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            initial_adapter=path_initial_model_for_weight_conversion,
            kwargs=kwargs,
        )

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | os.PathLike, adapter_name: str = "default", is_trainable: bool =
        False, config: PeftConfig | None = None, autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool =
        False, low_cpu_mem_usage: bool = False, key_mapping: dict[str, str] | None = None, **kwargs: Any,
    ) -> PeftModel:  # fmt: skip
        """Put a saved adapter on a base model, in the class of the adapter's task.

        Args:
            model: Base model, changed in place; as it was if loading fails.
            model_id: Folder, or name of a repository on the Hub.
            adapter_name: Name to give the adapter.
            is_trainable: Load it for further training; otherwise it is frozen and the model put in evaluation mode.
            config: Config to use instead of the saved one.
            autocast_adapter_dtype: Keep the adapter in float32 where it is in float16 or bfloat16.
            ephemeral_gpu_offload: Do the heavy part of DoRA's initialisation on the GPU where layers are on the CPU.
            low_cpu_mem_usage: Create the adapter empty and put the loaded tensors in, instead of copying them.
            key_mapping: Regular expressions and their replacements for the saved names, for base models that were
                renamed since.
            **kwargs: `torch_device`, and what the Hub's download takes: `subfolder`, `revision`, `token`, `cache_dir`, …
                Others, such as `device_map`, are for the base model and have no meaning here.

        Raises:
            ValueError: `config` is no `PeftConfig`, or no adapter is found, or it does not fit the model.
        """
        return loading.from_pretrained(
            cls,
            model,
            model_id,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            kwargs=kwargs,
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter as a further one, or into an existing one of that name. It is not activated.

        Args:
            model_id: Folder, or name of a repository on the Hub.
            adapter_name: Name to give the adapter.
            is_trainable: Load it for training; otherwise it is frozen and the model put in evaluation mode.
            torch_device: Device to read the file to, the CPU if None; the adapter then goes where its layers are.
            autocast_adapter_dtype: Keep the adapter in float32 where it is in float16 or bfloat16.
            ephemeral_gpu_offload: As in `from_pretrained`.
            low_cpu_mem_usage: As in `from_pretrained`.
            key_mapping: As in `from_pretrained`.
            **kwargs: As in `from_pretrained`.

        Returns:
            An object with `missing_keys`, parameters of this adapter that the file lacks, and `unexpected_keys`.

        Raises:
            ValueError: No adapter is found, or it does not fit the model, which is then as it was.
        """
        return loading.load_adapter(
            self,
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            torch_device=torch_device,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            **kwargs,
        )


def _uses_gradient_checkpointing(model: nn.Module) -> bool:
    for attribute in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # transformers renamed it in 5.x
        if hasattr(type(model), attribute):
            return bool(getattr(model, attribute))
    return False


def _require_grad_of_output(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
