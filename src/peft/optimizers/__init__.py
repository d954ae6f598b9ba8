# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Optimizers that know the two factors of LoRA apart."""

from .lorafa import create_lorafa_optimizer
from .loraplus import create_loraplus_optimizer
from .riemannian import create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
