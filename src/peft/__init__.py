# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Parameter-efficient fine-tuning, with DoRA on in-tree Triton kernels.

The public names, as in the upstream release whose interface this package matches.
"""

__version__ = "0.21.2+triton.1"

# fmt: off
# isort: off
from .auto import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING, AutoPeftModel, AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction, AutoPeftModelForQuestionAnswering, AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification,
)
from .config import PeftConfig, PromptLearningConfig
from .helpers import find_kappa_target_modules
from .mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, get_peft_config,
    inject_adapter_in_model,
)
from .mapping_func import get_peft_model
from .mixed_model import PeftMixedModel
from .peft_model import (
    PeftModel, PeftModelForCausalLM, PeftModelForFeatureExtraction, PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM, PeftModelForSequenceClassification, PeftModelForTokenClassification,
    get_layer_status, get_model_status,
)
from .tuners import (
    ArrowConfig, BdLoraConfig, EvaConfig, KasaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraModel,
    LoraRuntimeConfig, MontecloraConfig, PrefixTuningConfig, TrainableTokensConfig, TrainableTokensModel,
    VeloraConfig, XLoraConfig, XLoraModel,
    convert_to_lora, create_arrow_model,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_loraga,
    save_as_lora,
)
from .utils import (
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING, NoMatchingPeftModuleError, PeftError, PeftType,
    PeftWarning, TaskType, bloom_model_postprocess_past_key_value, cast_mixed_precision_params,
    get_base_model_state_dict, get_peft_model_state_dict, load_peft_weights, prepare_model_for_kbit_training,
    replace_lora_weights_loftq, set_base_model_state_dict, set_peft_model_state_dict, shift_tokens_right,
)

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "TaskType",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "VeloraConfig",
    "XLoraConfig",
    "XLoraModel",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "create_arrow_model",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]
