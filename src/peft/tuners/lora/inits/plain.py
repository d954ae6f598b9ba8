# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The starts that need nothing but a random generator: the adapter is zero, one factor is random."""

from __future__ import annotations

import math

import torch
from torch import nn


def reset_linear(lora_a: nn.Module, lora_b: nn.Module, r: int, kind: bool | str) -> None:
    """A uniform as in `nn.Linear` (True) or normal with deviation 1 / r ("gaussian"); B and its bias zero."""
    if kind is True:
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
    else:
        nn.init.normal_(lora_a.weight, std=1 / r)
    nn.init.zeros_(lora_b.weight)
    if lora_b.bias is not None:
        nn.init.zeros_(lora_b.bias)


def reset_embedding(lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    """A `[r, num_embeddings]` zero, B `[dim, r]` standard normal: the table's rows are looked up in A."""
    nn.init.zeros_(lora_a)
    nn.init.normal_(lora_b)
