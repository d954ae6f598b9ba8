# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Small things that every model with adapters does: naming them, and switching all of them off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.config import PeftConfig
from peft.engine.layer import BaseTunerLayer
from peft.engine.tuner import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper


@contextmanager
def added_adapter(tuner: BaseTuner, adapter_name: str, config: PeftConfig) -> Iterator[None]:
    """A block that injects a further adapter; it leaves what is trained alone, and nothing behind if it fails.

    Raises:
        ValueError: The name is taken, or cannot be part of a parameter's name.
    """
    check_adapter_name(adapter_name)
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or use another name.")
    active = tuner.active_adapter
    trained = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    tuner.peft_config[adapter_name] = config
    try:
        yield
    except Exception:
        tuner.delete_adapter(adapter_name)
        tuner.active_adapter = active
        raise
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextmanager
def disabled_adapters(tuner: BaseTuner) -> Iterator[None]:
    """All adapters of a tuner off and frozen inside the block, and as they were after it."""
    layers = [m for m in tuner.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    trained = {id(parameter) for parameter in tuner.parameters() if parameter.requires_grad}
    tuner.disable_adapter_layers()
    try:
        yield
    finally:
        if len(enabled) == len(layers):
            tuner.enable_adapter_layers()
        else:  # some were off before: leave those off
            for layer in enabled:
                layer.enable_adapters(True)
        for parameter in tuner.parameters():
            if parameter.requires_grad != (id(parameter) in trained):
                parameter.requires_grad_(id(parameter) in trained)


def check_adapter_name(name: str) -> None:
    """Raise a ValueError for a name that cannot be part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name must be a string that is not empty and holds no dot, got {name!r}.")
