# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which tuners exist: one row each, and the four live mappings from a `PeftType` that the rest of the package reads."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from peft.utils.peft_types import PeftType


@dataclass(frozen=True)
class TunerRow:
    """One tuner: where it lives, what it exports and how its parameters are called.

    Args:
        peft_type: Name of the `PeftType` member.
        module: Dotted path of the tuner's package.
        config: Name of its config class there.
        model: Name of its model class there.
        prefix: What the names of its parameters start with.
        mixed: Whether it may share a model with other tuners (`PeftMixedModel`).
    """

    peft_type: str
    module: str
    config: str
    model: str
    prefix: str
    mixed: bool = False


ROWS = (
    TunerRow("LORA", "peft.tuners.lora", "LoraConfig", "LoraModel", "lora_", mixed=True),
    TunerRow(
        "TRAINABLE_TOKENS",
        "peft.tuners.trainable_tokens",
        "TrainableTokensConfig",
        "TrainableTokensModel",
        "trainable_tokens_",
    ),
    TunerRow("XLORA", "peft.tuners.xlora", "XLoraConfig", "XLoraModel", "xlora_"),
)

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type] = {}
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type] = {}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type] = {}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {}


def register(peft_type: PeftType, config_cls: type, model_cls: type, prefix: str, mixed: bool = False) -> None:
    """Make a tuner known to the whole package; the mappings are filled in place, so earlier imports see it."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
    if mixed:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = model_cls


def register_rows() -> None:
    """Import every tuner of `ROWS` and register it. Called once, when `peft.tuners` is imported."""
    for row in ROWS:
        module = importlib.import_module(row.module)
        register(
            PeftType[row.peft_type], getattr(module, row.config), getattr(module, row.model), row.prefix, row.mixed
        )
