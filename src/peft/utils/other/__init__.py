# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What does not belong to one method: wrappers of trainable modules, quantised training, names, calls.

One file a subject; the names are found here, where other packages look for them.
"""

from peft.utils.constants import *  # noqa: F403
from peft.utils.constants import __all__ as _constants

from .additional import (
    _freeze_adapter,
    _set_adapter,
    _set_trainable,
    set_additional_trainable_modules,
)
from .calls import (
    _get_batch_size,
    _prepare_prompt_learning_config,
    check_file_exists_on_hf_hub,
    create_attention_mask,
    fsdp_auto_wrap_policy,
    infer_device,
    mlu_available,
    shift_tokens_right,
    str_to_bool,
    transpose,
)
from .kbit import (
    cast_mixed_precision_params,
    get_gptqmodel_quant_linear,
    get_quantization_config,
    is_gptqmodel_awq_layer,
    is_gptqmodel_quant_linear,
    prepare_model_for_kbit_training,
)
from .modules import (
    _get_input_embeddings_name,
    _get_submodules,
    _is_valid_match,
    get_pattern_key,
    id_tensor_storage,
    match_target_against_key,
)
from .modules_to_save import ModulesToSaveWrapper
from .trainable_tokens import TrainableTokensWrapper
from .wrapper import AuxiliaryTrainingWrapper

__all__ = [
    *_constants,
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
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
    "check_file_exists_on_hf_hub",
    "create_attention_mask",
    "fsdp_auto_wrap_policy",
    "get_gptqmodel_quant_linear",
    "get_pattern_key",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "is_gptqmodel_awq_layer",
    "is_gptqmodel_quant_linear",
    "match_target_against_key",
    "mlu_available",
    "prepare_model_for_kbit_training",
    "set_additional_trainable_modules",
    "shift_tokens_right",
    "str_to_bool",
    "transpose",
]
