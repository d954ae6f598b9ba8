# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The X-LoRA model: each pass is run twice, for the classifier's input and with its weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from peft.engine.tuner import BaseTuner
from peft.tuners.lora.layer import Embedding, LoraLayer, _ConvNd
from peft.tuners.lora.layer.linear import LoraLinearBase
from peft.tuners.lora.model import LoraModel
from peft.utils.peft_types import PeftType
from peft.utils.seams import public

from .classifier import XLoraClassifier
from .config import XLoraConfig
from .layer import XLoraConv2dLayer, XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer

_KINDS = ((LoraLinearBase, XLoraLinearLayer), (Embedding, XLoraEmbeddingLayer), (_ConvNd, XLoraConv2dLayer))


def convert_layers_to_xlora(
    base: nn.Module, xloramodel: nn.Module, config: XLoraConfig
) -> tuple[int, torch.device | None]:
    """Let every LoRA layer weigh its experts.

    Args:
        base: Model with the experts in it.
        xloramodel: The model that knows the weights of a pass.
        config: Settings.

    Returns:
        The number of layers, and the device of the last one's parameters.

    Raises:
        ValueError: A layer is of a kind whose experts cannot be weighed; nothing was changed.
    """
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    kinds = []
    for name, layer in layers:
        kind = next((weighed for cls, weighed in _KINDS if isinstance(layer, cls)), None)
        if kind is None:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, whose experts X-LoRA cannot weigh by token: use experts on linear "
                "layers, embeddings and convolutions."
            )
        kinds.append(kind)
    for number, ((_, layer), kind) in enumerate(zip(layers, kinds, strict=True)):
        layer.forward = kind(xloramodel, layer, layer.forward, number, config).forward
    device = next(layers[-1][1].parameters()).device if layers else None
    return len(layers), device


class XLoraModel(BaseTuner):
    """LoRA experts in a base model, and the classifier that weighs them.

    The base model's `use_cache` must be off: every pass needs the hidden states of all tokens.

    Args:
        model: Base model, changed in place.
        config: An `XLoraConfig`, or a dict of them by adapter name.
        adapter_name: Name of the adapter to create.
        torch_device: Where to read the experts to.
        ephemeral_gpu_offload: As for LoRA.
        autocast_adapter_dtype: Keep the experts and the classifier in float32 where the base model is in half precision.
        **kwargs: `low_cpu_mem_usage` for the experts.

    Raises:
        ValueError: The model caches keys and values, an expert is not LoRA, or its layers cannot be weighed.
    """

    prefix = "xlora_"
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, XLoraConfig] | XLoraConfig,
        adapter_name: str,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        configs = config if isinstance(config, dict) else {adapter_name: config}
        config = configs[adapter_name]
        if getattr(getattr(model, "config", None), "use_cache", False):
            raise ValueError(
                "X-LoRA needs the hidden states of all tokens in each pass: set model.config.use_cache=False."
            )
        if adapter_name in config.adapters:
            raise ValueError(f"adapters has an expert {adapter_name!r}, which is X-LoRA's own name here: rename one.")
        options = {
            "torch_device": torch_device,
            "ephemeral_gpu_offload": ephemeral_gpu_offload,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            "low_cpu_mem_usage": kwargs.get("low_cpu_mem_usage", False),
        }
        lora_model = _load_experts(model, config, options)
        self.model = model
        self.xlora_config = config
        self.__dict__["lora_model"] = lora_model  # not a child: its only child is `model`
        self.peft_config = {**configs, **({} if lora_model is None else lora_model.peft_config)}
        self.active_adapter = adapter_name
        self.disabled = False
        self.internal_xlora_scalings: torch.Tensor | None = None
        try:
            count, device = convert_layers_to_xlora(model, self, config)
        except ValueError:
            lora_model.unload()
            raise
        if device is None:
            device = next(model.parameters()).device
        self.internal_xlora_classifier = XLoraClassifier(model, config, len(config.adapters), count, device)
        if autocast_adapter_dtype and self.internal_xlora_classifier.dtype in (torch.float16, torch.bfloat16):
            self.internal_xlora_classifier.float()
        self._set_trainable(not config.inference_mode)
        self._hook = model.register_forward_pre_hook(self._weigh_experts, with_kwargs=True)

    def _set_trainable(self, trainable: bool) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.internal_xlora_classifier.requires_grad_(trainable)
        if self.lora_model is not None:
            self.lora_model.set_adapter(
                list(self.xlora_config.adapters),
                inference_mode=not (trainable and self.xlora_config.use_trainable_adapters),
            )

    # ---- calls ---------------------------------------------------------------------------------------------------
    def _weigh_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass of the base model: a first one, whose hidden states the classifier makes weights of."""
        if self.disabled or self.__dict__.get("_in_first_pass") or not self.xlora_config.adapters:
            return
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("X-LoRA cannot use a cache of keys and values: pass use_cache=False.")
        names = list(inspect.signature(module.forward).parameters)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {key: inputs.get(key) for key in ("input_ids", "inputs_embeds")}
        first = {key: value for key, value in inputs.items() if key != "labels"}
        first |= {"output_hidden_states": True, "return_dict": True}
        classifier = self.internal_xlora_classifier
        self.internal_xlora_scalings = classifier.make_dummy_scalings(**given)
        self.__dict__["_in_first_pass"] = True
        self.__dict__["_base_alone"] = not classifier.override_scaling_pass_value
        try:
            with torch.no_grad():
                result = module(**first)
        finally:
            self.__dict__["_in_first_pass"] = self.__dict__["_base_alone"] = False
            self.internal_xlora_scalings = None
        self.internal_xlora_scalings = classifier(result, **given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass with weighed experts."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with weighed experts, without a cache."""
        return self.model.generate(*args, **{**kwargs, "use_cache": False})

    def enable_adapter_layers(self) -> None:
        self.disabled = False
        if self.lora_model is not None:
            self.lora_model.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        self.disabled = True
        if self.lora_model is not None:
            self.lora_model.disable_adapter_layers()

    def __getstate__(self) -> dict[str, Any]:
        # the last pass's weights hang on its graph, which cannot be copied
        return {**self.__dict__, "internal_xlora_scalings": None}

    # ---- adapters ------------------------------------------------------------------------------------------------
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate X-LoRA's adapter, trainable unless `inference_mode`; the experts act through it.

        Raises:
            ValueError: Another name is given.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if names != self.active_adapters:
            raise ValueError(
                f"X-LoRA has one adapter, {self.active_adapters[0]!r}, and weighs all experts: got {names}."
            )
        self._set_trainable(not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        raise ValueError(f"X-LoRA's adapters belong together, {adapter_name!r} cannot be deleted: call unload().")

    def _check_merge_allowed(self) -> None:
        raise RuntimeError("X-LoRA weighs its experts by token, so that they cannot be merged: call unload() instead.")

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("X-LoRA's layers are its experts': name them in XLoraConfig.adapters.")

    def unload(self) -> nn.Module:
        """Take the experts out and return the plain base model."""
        self._hook.remove()
        for module in self.model.modules():
            if isinstance(getattr(module.__dict__.get("forward"), "__self__", None), XLoraLayer):
                del module.forward
        return self.model if self.lora_model is None else self.lora_model.unload()

    # ---- weights -------------------------------------------------------------------------------------------------
    def set_topk_lora(self, value: int | None) -> None:
        """Let each token use its `value` best experts; None for all."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of all weights."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """The factor of all weights."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the experts' weight in the first pass; None for one over their number."""
        if value is None:
            value = 1 / max(1, len(self.xlora_config.adapters))
        self.internal_xlora_classifier.override_scaling_pass_value = value
        self.xlora_config.scaling_pass_value = value

    def get_latest_scalings(self) -> torch.Tensor | None:
        """Weights of the last pass `[batch, length, layers, experts]`, None before the first one."""
        return self.internal_xlora_scalings

    def enable_scalings_logging(self) -> None:
        """Keep the weights of every pass from now on."""
        self.internal_xlora_classifier.scalings_logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more weights; the log stays."""
        self.internal_xlora_classifier.scalings_logging = False

    def clear_scalings_log(self) -> None:
        """Empty the log."""
        self.internal_xlora_classifier.log_scalings.clear()

    def get_scalings_log(self) -> list[torch.Tensor]:
        """A copy of the log: weights by pass."""
        return list(self.internal_xlora_classifier.log_scalings)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """The log by length of the input: numbers of the passes, and their weights."""
        return self.internal_xlora_classifier.bucketed_log()

    # ---- files ---------------------------------------------------------------------------------------------------
    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list[str]
    ) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state_dict.items() if "internal_xlora_classifier." in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key


def _load_experts(model: nn.Module, config: XLoraConfig, options: dict[str, Any]) -> LoraModel | None:
    """Put all experts into a model; None where there are none."""
    trainable = config.use_trainable_adapters
    holder: nn.Module | None = None
    for name, path in config.adapters.items():
        if holder is None:
            holder = public("peft.peft_model", "PeftModel").from_pretrained(
                model, path, adapter_name=name, is_trainable=trainable, **options
            )
        else:
            holder.load_adapter(path, name, is_trainable=trainable, **options)
        if holder.peft_config[name].peft_type != PeftType.LORA:
            holder.base_model.unload()
            raise ValueError(
                f"adapters[{name!r}]={path!r} is {holder.peft_config[name].peft_type}: X-LoRA weighs LoRA."
            )
    return None if holder is None else holder.base_model
