# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every model with adapters does: naming them, switching all of them off for a while, and saying how it stands."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft.config import PeftConfig
from peft.engine.layer import BaseTunerLayer
from peft.engine.tuner import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.seams import public

from . import card, status

FACADE = "peft.peft_model"  # where other packages look for, and replace, the functions that this package calls


class HoldsAdapters(nn.Module):
    """A model whose tuner is `base_model`; what is not found here is looked for there, and then in the base model."""

    base_model: BaseTuner

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: asking it for its own name would not end
                raise
            return getattr(self.base_model, name)

    def _check_adapters_exist(self, adapter_names: str | Sequence[str]) -> list[str]:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"There is no adapter {', '.join(map(repr, unknown))}; this model has "
                f"{', '.join(map(repr, self.peft_config)) or 'none'}."
            )
        return names

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Give the base model's output inside the block; adapters are frozen there and restored after it."""
        with disabled_adapters(self.base_model):
            yield

    # ---- what it says of itself --------------------------------------------------------------------------------------
    def _status_of(self) -> nn.Module:
        """The model that a status is asked of."""
        return self

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of every adapted layer."""
        return public(FACADE, "get_layer_status")(self._status_of())

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of all adapted layers together."""
        return public(FACADE, "get_model_status")(self._status_of())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of trainable and of all parameters."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        print(status.trainable_summary(*self.get_nb_trainable_parameters()))

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write README.md, or add to the one that is there what the Hub needs to know of an adapter.

        Args:
            output_dir: Folder of the adapters.
        """
        card.write_model_card(self, output_dir)


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
    """Raise a ValueError for a name that cannot be part of a parameter's name, or be a key of torch's containers."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name must be a string that is not empty and holds no dot, got {name!r}.")
    if any(hasattr(container, name) for container in (nn.ModuleDict(), nn.ParameterDict())):
        raise ValueError(
            f"adapter_name={name!r} is an attribute of the containers that torch keeps adapters in: use another name, "
            f"such as {f'{name}_adapter'!r}."
        )
