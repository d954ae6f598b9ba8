# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The methods, one folder each; `_registry` lists them."""

# fmt: off
# isort: off
from ._registry import register_rows
from .lora import (
    ArrowConfig, BdLoraConfig, EvaConfig, KasaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraModel,
    LoraRuntimeConfig, MontecloraConfig, VeloraConfig, convert_to_lora, create_arrow_model, get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_loraga, save_as_lora,
)
from .prefix_tuning import PrefixTuningConfig
from .trainable_tokens import TrainableTokensConfig, TrainableTokensModel
from .xlora import XLoraConfig, XLoraModel

register_rows()

__all__ = [
    "ArrowConfig", "BdLoraConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig",
    "LoraModel", "LoraRuntimeConfig", "MontecloraConfig", "PrefixTuningConfig", "TrainableTokensConfig",
    "TrainableTokensModel", "VeloraConfig", "XLoraConfig", "XLoraModel", "convert_to_lora", "create_arrow_model",
    "get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga",
    "save_as_lora",
]
