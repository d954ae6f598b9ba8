# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Where prompt-learning methods (learned tokens in front of the input) attach to a `PeftModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from .status import method_name

if TYPE_CHECKING:
    from peft.config import PeftConfig

    from .base import PeftModel


def refuse_prompt_learning(config: PeftConfig) -> None:
    """Raise a ValueError for a method whose adapter is a learned prompt: this version has none."""
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_type={method_name(config)!r} is a prompt-learning method, and this version has none of them: use "
            "a method that adapts layers, such as LoraConfig."
        )


def no_prompt(model: PeftModel, adapter_name: str | None) -> NoReturn:
    """Raise the ValueError of asking an adapter for a prompt that it does not have."""
    raise ValueError(
        f"Adapter {adapter_name!r} ({method_name(model)}) has no prompt: only adapters of prompt-learning methods do."
    )
