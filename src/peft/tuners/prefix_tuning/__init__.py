# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Prefix tuning: its config."""

from .config import PrefixTuningConfig

__all__ = ["PrefixTuningConfig"]
