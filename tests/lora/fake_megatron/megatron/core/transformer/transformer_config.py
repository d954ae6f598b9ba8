# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`megatron.core.transformer.transformer_config`: the settings that parallel layers read."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class TransformerConfig:
    """Those of its fields that matter here, with the defaults that it gives them."""

    num_layers: int = 1
    hidden_size: int = 8
    num_attention_heads: int = 1
    tensor_model_parallel_size: int = 1
    use_cpu_initialization: bool = True
    sequence_parallel: bool = False
    init_method: Any = nn.init.xavier_normal_
