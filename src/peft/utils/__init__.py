# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Names that all methods share, re-exported where other packages look for them."""

from .constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from .error import NoMatchingPeftModuleError, PeftError
from .integrations import map_cache_to_layer_device_map
from .loftq_utils import replace_lora_weights_loftq
from .other import *  # noqa: F403
from .other import __all__ as _names_of_other
from .peft_types import PeftType, TaskType, register_peft_method
from .quantization_utils import get_quantization_kwargs, quantization_extra_repr, resolve_quantization_backend
from .save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from .warning import PeftWarning

__all__ = [
    *_names_of_other,
    "ALLOWED_COMPUTE_DTYPES",
    "UPCAST_DTYPES",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftWarning",
    "PeftType",
    "TaskType",
    "register_peft_method",
    "get_quantization_kwargs",
    "quantization_extra_repr",
    "resolve_quantization_backend",
    "map_cache_to_layer_device_map",
    "replace_lora_weights_loftq",
    "load_peft_weights",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
    "get_base_model_state_dict",
    "set_base_model_state_dict",
]
