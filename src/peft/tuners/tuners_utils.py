# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The engine under the names and at the path where other packages look for it."""

from torch import nn

from peft.engine.activate import delete_adapter, set_adapter, set_requires_grad
from peft.engine.casting import cast_adapter_dtype
from peft.engine.devices import get_device_map, onload_layer
from peft.engine.inject import inspect_matched_modules
from peft.engine.layer import BaseTunerLayer, check_adapters_to_merge
from peft.engine.machine import AdapterLayer
from peft.engine.replicate import clone_module, replicate_layers
from peft.engine.targets import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    find_minimal_target_modules,
)
from peft.engine.tuner import BaseTuner
from peft.engine.tying import warn_msg_weight_tying


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The dotted name of a module inside a model, or an empty string where it is not part of it.

    Args:
        model: Model to search.
        reference_module: Module to find, compared by identity.
    """
    return next((name for name, module in model.named_modules() if module is reference_module), "")


class BasePromptEncoder(nn.Module):
    """What makes the virtual tokens of a prompt-learning method; its `forward` gives them `[batch, tokens, features]`."""


# The path that other packages know these by.
for _public in (BaseTuner, BaseTunerLayer):
    _public.__module__ = __name__

__all__ = [
    "AdapterLayer",
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "_ExcludedModule",
    "_maybe_include_all_linear_layers",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_minimal_target_modules",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "onload_layer",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
    "warn_msg_weight_tying",
]
