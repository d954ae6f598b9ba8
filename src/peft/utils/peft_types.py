# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Names of methods and tasks as they stand in configs, and the way to add a method from outside."""

from __future__ import annotations

import enum
from typing import Any


class _NamedByValue(str, enum.Enum):
    """A string enum whose values are its members' names."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name


class PeftType(_NamedByValue):
    """Fine-tuning methods that `adapter_config.json` can name; the value is the name.

    A member says that the name is reserved, not that the method is installed: which ones are is told by
    `peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING`.
    """

    PROMPT_TUNING = enum.auto()
    MULTITASK_PROMPT_TUNING = enum.auto()
    P_TUNING = enum.auto()
    PREFIX_TUNING = enum.auto()
    LORA = enum.auto()
    ADALORA = enum.auto()
    ADAMSS = enum.auto()
    BOFT = enum.auto()
    ADAPTION_PROMPT = enum.auto()
    IA3 = enum.auto()
    BEFT = enum.auto()
    LILY = enum.auto()
    LOHA = enum.auto()
    LOKR = enum.auto()
    OFT = enum.auto()
    POLY = enum.auto()
    LN_TUNING = enum.auto()
    VERA = enum.auto()
    FROD = enum.auto()
    PVERA = enum.auto()
    FOURIERFT = enum.auto()
    GLORA = enum.auto()
    XLORA = enum.auto()
    HRA = enum.auto()
    VBLORA = enum.auto()
    UNILORA = enum.auto()
    CPT = enum.auto()
    MISS = enum.auto()
    RANDLORA = enum.auto()
    ROAD = enum.auto()
    TRAINABLE_TOKENS = enum.auto()
    HIRA = enum.auto()
    SHIRA = enum.auto()
    C3A = enum.auto()
    WAVEFT = enum.auto()
    OSF = enum.auto()
    DELORA = enum.auto()
    GRALORA = enum.auto()
    CARTRIDGE = enum.auto()
    TINYLORA = enum.auto()
    PSOFT = enum.auto()
    PEANUT = enum.auto()
    SHADOW = enum.auto()
    SUPERTUNING = enum.auto()
    DEFT = enum.auto()


class TaskType(_NamedByValue):
    """Tasks that decide which `PeftModel` class wraps the base model."""

    SEQ_CLS = enum.auto()
    SEQ_2_SEQ_LM = enum.auto()
    CAUSAL_LM = enum.auto()
    TOKEN_CLS = enum.auto()
    QUESTION_ANS = enum.auto()
    FEATURE_EXTRACTION = enum.auto()


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Make a method known to configs, `get_peft_model`, saving and loading.

    Args:
        name: Lower-case name of the method; its upper-case form must be a member of `PeftType`.
        config_cls: Config class of the method.
        model_cls: Tuner class of the method.
        prefix: What the names of its parameters start with; `name + "_"` if None.
        is_mixed_compatible: Whether it may share a base model with other methods in a `PeftMixedModel`.

    Raises:
        ValueError: `name` is not lower case or not in `PeftType`, or the prefix belongs to another method.
        KeyError: A method of this name is registered already.
    """
    from peft.tuners._registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, register

    if not name or name != name.lower():
        raise ValueError(f"name={name!r} must be written in lower case.")
    if name.upper() not in PeftType.__members__:
        raise ValueError(f"name={name!r} needs a member {name.upper()} of PeftType: add it there first.")
    peft_type = PeftType[name.upper()]
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise KeyError(f"The method name={name!r} is registered already; a method can be registered once.")
    prefix = f"{name}_" if prefix is None else prefix
    owner = next((other for other, taken in PEFT_TYPE_TO_PREFIX_MAPPING.items() if taken == prefix), None)
    if owner is not None:
        raise ValueError(f"prefix={prefix!r} is the prefix of {owner.value} already: choose another one.")
    register(peft_type, config_cls, model_cls, prefix, mixed=is_mixed_compatible)
