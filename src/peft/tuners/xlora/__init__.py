# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""X-LoRA (Buehler & Buehler, arXiv 2402.07148): LoRA experts that a classifier weighs by token and layer."""

from .config import XLoraConfig
from .model import XLoraModel

__all__ = ["XLoraConfig", "XLoraModel"]
