# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Names of methods and tasks as they stand in configs, and the way to add a method from outside."""

from __future__ import annotations

import enum
from typing import Any


class PeftType(str, enum.Enum):
    """Fine-tuning methods that `adapter_config.json` can name; the value is the name.

    A member says that the name is reserved, not that the method is installed: which ones are is told by
    `peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING`.
    """

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, enum.Enum):
    """Tasks that decide which `PeftModel` class wraps the base model."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


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
