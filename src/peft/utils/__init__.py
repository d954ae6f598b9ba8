# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Names that all methods share, re-exported where other packages look for them."""

from .constants import *  # noqa: F403
from .constants import __all__ as _constants
from .error import (
    NoMatchingPeftModuleError,
    PeftError,
)
from .integrations import map_cache_to_layer_device_map
from .loftq_utils import replace_lora_weights_loftq
from .other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _freeze_adapter,
    _get_batch_size,
    _get_input_embeddings_name,
    _get_submodules,
    _is_valid_match,
    _prepare_prompt_learning_config,
    _set_adapter,
    _set_trainable,
    cast_mixed_precision_params,
    get_gptqmodel_quant_linear,
    get_quantization_config,
    id_tensor_storage,
    infer_device,
    prepare_model_for_kbit_training,
    set_additional_trainable_modules,
    shift_tokens_right,
    transpose,
)
from .peft_types import (
    PeftType,
    TaskType,
    register_peft_method,
)
from .quantization_utils import (
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from .save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from .warning import PeftWarning

__all__ = [
    *_constants,
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_submodules",
    "_is_valid_match",
    "_prepare_prompt_learning_config",
    "_set_adapter",
    "_set_trainable",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_gptqmodel_quant_linear",
    "get_peft_model_state_dict",
    "get_quantization_config",
    "get_quantization_kwargs",
    "id_tensor_storage",
    "infer_device",
    "load_peft_weights",
    "map_cache_to_layer_device_map",
    "prepare_model_for_kbit_training",
    "quantization_extra_repr",
    "register_peft_method",
    "replace_lora_weights_loftq",
    "resolve_quantization_backend",
    "set_additional_trainable_modules",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "transpose",
]
