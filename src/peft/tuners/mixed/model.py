# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The tuner that holds adapters of several methods: each adapter is created the way its own method does it."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.config import PeftConfig
from peft.engine.layer import BaseTunerLayer
from peft.engine.tuner import BaseTuner
from peft.tuners._registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, ROWS
from peft.utils.peft_types import PeftType

COMPATIBLE_TUNER_TYPES = tuple(PeftType[row.peft_type] for row in ROWS if row.mixed)


class MixedModel(BaseTuner):
    """Keeps adapters of different methods in the layers of one base model.

    Where two methods adapt one module, the layer of the later one goes around that of the earlier one.

    Args:
        model: Base model, changed in place.
        config: Configs by adapter name.
        adapter_name: Name of the adapter to create.

    Raises:
        ValueError: An adapter's method does not go together with others.
    """

    prefix = "lora_"
    tuner_layer_cls = BaseTunerLayer

    def __init__(self, model: nn.Module, config: dict[str, PeftConfig], adapter_name: str) -> None:
        super().__init__(model, config, adapter_name)

    def _as_tuner_of(self, config: PeftConfig) -> BaseTuner:
        """This model seen as the tuner of one method: the same model, adapters and settings, that method's code."""
        tuner_cls = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[config.peft_type]
        tuner = tuner_cls.__new__(tuner_cls)
        tuner.__dict__ = self.__dict__
        return tuner

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            compatible = ", ".join(method.value for method in PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
            raise ValueError(
                f"peft_type={getattr(config.peft_type, 'value', config.peft_type)!r} does not go together with other "
                f"methods in one model; these do: {compatible}."
            )
        self._as_tuner_of(config)._check_new_adapter_config(config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return self._as_tuner_of(peft_config)._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(self, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        self._as_tuner_of(peft_config)._create_and_replace(peft_config, *args, **kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in self.peft_config.values()}
        adapters = [
            (parameter, parameter.requires_grad)
            for name, parameter in model.named_parameters()
            if any(prefix in name for prefix in prefixes)
        ]
        super()._mark_only_adapters_as_trainable(model)
        for parameter, requires_grad in adapters:
            parameter.requires_grad_(requires_grad)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with adapters."""
        return self.model.generate(*args, **kwargs)
