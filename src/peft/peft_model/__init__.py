# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The model that users hold: a base model with named adapters, and one class for each task.

Other packages replace some of the names below (`load_adapter` on the class, `get_peft_model_state_dict` on the
module, …), so the rooms of this package look those up here when they call them.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
    shift_tokens_right,
)
from peft.utils.other import create_attention_mask, infer_device, set_additional_trainable_modules

from .base import PeftModel
from .causal_lm import PeftModelForCausalLM
from .heads import (
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .seq2seq import PeftModelForSeq2SeqLM
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "create_attention_mask",
    "get_layer_status",
    "get_model_status",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "set_additional_trainable_modules",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]
