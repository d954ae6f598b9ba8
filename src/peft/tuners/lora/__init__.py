# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA and its family: configs, layers, variants and the model that holds them."""

# fmt: off
# isort: off
from .arrow import create_arrow_model
from .bnb import Linear4bit, Linear8bitLt
from .config import (
    ArrowConfig, BdLoraConfig, EvaConfig, KasaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig,
    MontecloraConfig, VeloraConfig,
)
from .conversion import convert_to_lora, save_as_lora
from .eetq import EetqLoraLinear
from .gptq import GPTQLoraLinear
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, ParamWrapper
from .loraga import preprocess_loraga
from .model import LoraModel

__all__ = [
    "ArrowConfig", "BdLoraConfig", "Conv1d", "Conv2d", "Conv3d", "EetqLoraLinear", "Embedding", "EvaConfig",
    "GPTQLoraLinear", "KasaConfig",
    "Linear", "Linear4bit", "Linear8bitLt", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraLayer",
    "LoraModel", "LoraRuntimeConfig", "MontecloraConfig", "ParamWrapper", "VeloraConfig",
    "convert_to_lora", "create_arrow_model", "get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga", "save_as_lora",
]
